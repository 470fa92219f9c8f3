"""What numbers publications: this daemon alone, or several together."""
