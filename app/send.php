<?php

/**
 * Broadcasts the message in the form of index.php.
 *
 * Scripts, which accept application/json, get the receipt or {"error": "…"}. A browser without JavaScript is redirected
 * to the form, or gets a page that says what is wrong.
 */

declare(strict_types=1);

namespace Demo;

use Realtime\NoDaemonException;
use Realtime\ProtocolException;
use Realtime\RealtimeException;
use Realtime\Receipt;
use Realtime\RefusedException;
use Realtime\TimeoutException;

require __DIR__ . '/page.php';
require __DIR__ . '/realtime.php';

/** An answer other than a receipt, in a sentence for people and a status for programs. */
final class Refusal extends \RuntimeException
{
    public function __construct(public readonly int $status, string $sentence, ?\Throwable $cause = null)
    {
        parent::__construct($sentence, 0, $cause);
    }
}

/** Carry out the request. */
function broadcast_form(): Receipt
{
    if (($_SERVER['REQUEST_METHOD'] ?? '') !== 'POST') {
        \header('Allow: POST');
        throw new Refusal(405, 'This page only takes what the form sends.');
    }
    if ($_POST === [] && (int) ($_SERVER['CONTENT_LENGTH'] ?? 0) > 0) {
        throw new Refusal(413, "This is more than PHP takes: see post_max_size, which is " . \ini_get('post_max_size') . '.');
    }
    start_session(readOnly: true);
    $token = $_SESSION['token'] ?? null;
    $given = $_POST['token'] ?? null;
    if (!\is_string($token) || !\is_string($given) || !\hash_equals($token, $given)) {
        throw new Refusal(403, 'This form has expired, or was not sent by this site. Load the page again.');
    }
    $channel = $_POST['channel'] ?? null;
    $message = $_POST['message'] ?? null;
    if (!\is_string($channel) || !\is_string($message)) {
        throw new Refusal(422, 'A broadcast needs a channel and a message.');
    }
    try {
        return \Realtime\broadcast($channel, $message);
    } catch (RealtimeException $error) {
        $status = match (true) {
            $error instanceof RefusedException => 422,
            $error instanceof NoDaemonException => 503,
            $error instanceof TimeoutException => 504,
            $error instanceof ProtocolException => 502,
            default => 500,
        };
        throw new Refusal($status, \ucfirst($error->getMessage()), $error);
    }
}

/** Return the outcome of a broadcast as a sentence. */
function sentence(Receipt $receipt, string $channel): string
{
    $reached = match ($receipt->recipients) {
        0 => 'Reached nobody: no client watches this channel',
        1 => 'Reached 1 client',
        default => "Reached {$receipt->recipients} clients",
    };
    return "{$reached} · {$channel} #{$receipt->offset}";
}

/** @param array<string, int|string> $content */
function answer_json(int $status, array $content): void
{
    \http_response_code($status);
    send_headers('application/json');
    echo \json_encode($content, JSON_THROW_ON_ERROR | JSON_INVALID_UTF8_SUBSTITUTE | JSON_UNESCAPED_UNICODE), "\n";
}

function answer_page(int $status, string $sentence): void
{
    \http_response_code($status);
    send_headers('text/html');
    print_head('Not broadcast');
    ?>
<body>
  <header>
    <?php print_name(); ?>
  </header>
  <main class="answer">
    <h1>Not broadcast</h1>
    <p class="trouble"><?= escaped($sentence) ?></p>
    <p><a href="./">Back to the form</a></p>
  </main>
</body>
</html>
    <?php
}

$asksForJson = \str_contains($_SERVER['HTTP_ACCEPT'] ?? '', 'application/json');
try {
    $receipt = broadcast_form();
} catch (Refusal $refusal) {
    $asksForJson
        ? answer_json($refusal->status, ['error' => $refusal->getMessage()])
        : answer_page($refusal->status, $refusal->getMessage());
    exit;
}

$sentence = sentence($receipt, $_POST['channel']);
if ($asksForJson) {
    answer_json(200, ['sentence' => $sentence] + \get_object_vars($receipt));
} else {
    start_session();
    $_SESSION['outcome'] = $sentence;
    \header('Location: ./', true, 303); // so that a reload does not send the message again
}
