<?php

// What a page does that broadcasts once: connect, send, wait for the answer, over and over; prints nanoseconds as JSON.
// Usage: php call.php CLIENT-FILE CALLS

declare(strict_types=1);

require $argv[1];

$taken = [];
for ($call = 0; $call < (int) $argv[2]; $call++) {
    $began = hrtime(true);
    $client = new Realtime\Client();
    $client->broadcast('nobody', str_repeat('x', 128));
    unset($client);
    $taken[] = hrtime(true) - $began;
}
echo json_encode($taken), "\n";
