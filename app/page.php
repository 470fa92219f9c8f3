<?php

/** The parts that index.php and send.php share: the visitor's session, HTTP headers and the top of the document. */

declare(strict_types=1);

namespace Demo;

if (\count(\get_included_files()) === 1) {
    \http_response_code(404); // this file is not a page of its own
    exit;
}

/** Open the session; with $readOnly, close it again at once, so that no other request of the visitor has to wait. */
function start_session(bool $readOnly = false): void
{
    \session_start([
        'name' => 'realtime_demo_' . $_SERVER['SERVER_PORT'], // cookies belong to a host, whatever the port
        'use_strict_mode' => true,
        'cookie_httponly' => true,
        'cookie_samesite' => 'Lax',
        'cookie_secure' => !\in_array($_SERVER['HTTPS'] ?? '', ['', 'off'], true),
    ]);
    if ($readOnly) {
        \session_write_close(); // after read_and_close the session would expire while it is in use
    }
}

/** Send the headers of every answer: the page loads nothing from elsewhere, and runs only the scripts in its files. */
function send_headers(string $type): void
{
    \header("Content-Type: $type; charset=utf-8");
    \header(
        "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        . " img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    );
    \header('X-Content-Type-Options: nosniff');
    // With less than this, browsers would send "Origin: null" when the form is posted.
    \header('Referrer-Policy: same-origin');
}

/** Escape text for HTML, attributes included. */
function escaped(string $text): string
{
    return \htmlspecialchars($text, ENT_QUOTES | ENT_SUBSTITUTE | ENT_HTML5, 'UTF-8');
}

/** Print the document up to its body. */
function print_head(string $title): void
{
    ?>
<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title><?= escaped($title) ?></title>
  <link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='%23d3532b' stroke-width='2.4' stroke-linecap='round'%3E%3Ccircle cx='5' cy='19' r='2' fill='%23d3532b'/%3E%3Cpath d='M5 12a7 7 0 0 1 7 7M5 5a14 14 0 0 1 14 14'/%3E%3C/svg%3E">
  <link rel="stylesheet" href="style.css">
</head>
    <?php
}

/** Print the project's name and sign for the top of a page. */
function print_name(): void
{
    ?>
    <a class="name" href="./">
      <svg viewBox="0 0 24 24" aria-hidden="true"><circle cx="5" cy="19" r="2"/><path d="M5 12a7 7 0 0 1 7 7"/><path d="M5 5a14 14 0 0 1 14 14"/></svg>
      realtimed
    </a>
    <?php
}
