"""`realtimectl doctor`: checks every part between a PHP page and a browser, and says what to do about its faults."""
