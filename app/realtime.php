<?php

/**
 * The PHP client of realtimed, in one file: it needs no extension and no Composer, only 64-bit PHP 8.1 or later.
 *
 *     require_once 'realtime.php';
 *     broadcast('news', 'hello');
 *
 * It works the same under PHP-FPM, on the command line and in queue workers. REALTIME_SOCKET names the daemon's control
 * socket; the default is /run/realtime.sock. All failures are Realtime\RealtimeExceptions.
 *
 * Laravel has its own broadcast(). This file leaves it alone if it is loaded after Composer's autoloader; there, and
 * wherever else the global name is taken, use Realtime\broadcast() or a Realtime\Client.
 *
 * Keep this file out of your web server's document root, or have it run as PHP: it prints nothing.
 */

declare(strict_types=1);

namespace Realtime {

    /**
     * The root of the exceptions of this file:
     *
     *     RealtimeException
     *     ├── NoDaemonException     nothing answers at the socket; nothing was sent
     *     ├── TimeoutException      no answer in time; the request may still be carried out
     *     ├── RefusedException      the daemon refused, and says why; nothing was done
     *     └── ProtocolException     the connection broke before the answer, or the answer is invalid;
     *                               the request may have been carried out, or not
     *
     * A broadcast with a key may be repeated when its outcome is unknown: {@see Client::broadcast()}.
     */
    class RealtimeException extends \RuntimeException
    {
    }

    /** No daemon could be reached at the control socket. The text names the path, and what to check. */
    class NoDaemonException extends RealtimeException
    {
    }

    /** The daemon did not answer in time. Unless the text says that nothing was sent, it may still carry it out. */
    class TimeoutException extends RealtimeException
    {
    }

    /** The daemon refused: an invalid channel, a message too large or not UTF-8, and the like. */
    class RefusedException extends RealtimeException
    {
        public function __construct(private readonly string $errorCode, string $text)
        {
            parent::__construct("{$text} ({$errorCode})");
        }

        /** One word for programs, such as "invalid_channel"; docs/protocol.md lists them. */
        public function getErrorCode(): string
        {
            return $this->errorCode;
        }
    }

    /** The connection broke before the answer came, or the answer is invalid. */
    class ProtocolException extends RealtimeException
    {
    }

    /** The outcome of a broadcast. */
    final class Receipt
    {
        /**
         * @param int $recipients the number of clients the message was queued for
         * @param string $epoch changes when the offsets of the channel start again at 1
         * @param int $offset numbers the messages of a channel one by one
         * @param bool $repeated whether a broadcast with the same key was carried out before: then this is its receipt,
         *     and nothing was sent again
         */
        public function __construct(
            public readonly int $recipients,
            public readonly string $epoch,
            public readonly int $offset,
            public readonly bool $repeated = false,
        ) {
        }
    }

    /** A channel, its number of subscribers, the offset of its newest message, and how many messages are kept. */
    final class ChannelInfo
    {
        public function __construct(
            public readonly string $channel,
            public readonly int $subscribers,
            public readonly string $epoch,
            public readonly int $offset,
            public readonly int $history,
        ) {
        }
    }

    /** The messages that the daemon keeps of a channel. */
    final class History
    {
        /**
         * @param string $epoch that of the channel; "" if there is no such channel
         * @param int $offset that of the channel's newest message; 0 if there was none
         * @param list<Message> $messages the newest ones, oldest first
         */
        public function __construct(
            public readonly string $epoch,
            public readonly int $offset,
            public readonly array $messages,
        ) {
        }
    }

    /** A message out of a channel's history: text, or bytes if it is binary. */
    final class Message
    {
        /**
         * @param ?float $time when it was published, in seconds since 1970 by the clock of the daemon's machine; null
         *     if the daemon is older than this client and does not send it
         */
        public function __construct(
            public readonly int $offset,
            public readonly string $message,
            public readonly bool $binary,
            public readonly ?float $time = null,
        ) {
        }
    }

    /** Bytes that are not text, sent or received: PHP's strings do not tell them apart. */
    final class Bytes
    {
        public function __construct(public readonly string $bytes)
        {
        }
    }

    /**
     * Talks to the daemon through its control socket.
     *
     * The first call opens the connection and later calls reuse it; after a restart of the daemon the next call opens
     * another. A request without a key is never sent twice: unless it is certain that nothing of it has arrived, the
     * call throws. After a fork the child opens a connection of its own.
     *
     * Every method may throw each of the exceptions of {@see RealtimeException}.
     */
    class Client
    {
        /** Ids are 32-bit unsigned numbers; after the largest one comes 0. */
        private const ID_LIMIT = 2 ** 32;

        /** Random bytes of a generated key: as many as a UUID has. */        private const KEY_BYTES = 16;

        /** How long to wait, after a connection broke, before repeating a request: the daemon may be restarting. */
        private const REPEAT_MICROSECONDS = 50_000;

        /** Channels to ask for in a page. The daemon may send fewer. */
        private const PAGE = 1000;

        /** Bytes of memory that a list of channels may take; PHP's memory_limit is commonly twice that. */
        private const LIST_BYTES = 64 * 2 ** 20;

        /** About how many of them a channel takes beside its name. */
        private const CHANNEL_BYTES = 250;

        /** Bytes counted for each page, even an empty one, so that the pages come to an end. */
        private const PAGE_BYTES = 64 * 1024;

        /** Bytes of the daemon's own words that an exception shows. */
        private const SAID_BYTES = 1000;

        /** The path of the control socket. */
        public readonly string $socket;

        private int $nextId = 0;

        /** Set only between calls. It owes no answer. */
        private ?Connection $connection = null;

        /**
         * @param string|null $socket the path of the control socket, with or without unix: before it; the default is
         *     REALTIME_SOCKET, else /run/realtime.sock
         * @param float $timeout how many seconds a call may take in all, from the connection to the answer
         */
        public function __construct(?string $socket = null, public readonly float $timeout = 5.0)
        {
            if (!($timeout > 0)) {
                throw new \ValueError("timeout must be above 0 seconds, not {$timeout}");
            }
            $this->socket = Connection::path($socket ?? self::defaultSocket());
        }

        public function __clone()
        {
            $this->connection = null;
        }

        /**
         * The state that a queued job keeps of its client: the worker that runs the job opens a connection of its own.
         *
         * @return array{socket: string, timeout: float}
         */
        public function __serialize(): array
        {
            return ['socket' => $this->socket, 'timeout' => $this->timeout];
        }

        /** @param array{socket: string, timeout: float} $kept */
        public function __unserialize(array $kept): void
        {
            $this->__construct($kept['socket'], $kept['timeout']);
        }

        /** The path of the control socket for clients that are given none. */
        public static function defaultSocket(): string
        {
            // PHP-FPM may have cleared the environment; variables of its pool or a .env file are in $_SERVER or $_ENV.
            $path = \function_exists('getenv') ? \getenv('REALTIME_SOCKET') : false;
            if ($path === false) {
                $path = $_SERVER['REALTIME_SOCKET'] ?? $_ENV['REALTIME_SOCKET'] ?? null;
            }
            return \is_string($path) ? $path : '/run/realtime.sock';
        }

        /**
         * Send a text to all clients that watch the channel. Text that is not UTF-8 is refused: see broadcastBinary().
         *
         *     $client->broadcast('news', 'hello', retry: true);
         *     $client->broadcast('scores', '2:1', key: "match-{$match->id}-goal-3");
         *
         * A key of 1 to 200 characters makes the broadcast safe to repeat (docs/protocol.md, 6.7): of all broadcasts
         * with this key and this channel the daemon carries out the first, whatever the messages of the others are, and
         * answers the others with its receipt, which is marked as repeated. So when the daemon hangs up before it
         * answers, the call itself repeats the broadcast, on another connection, until the timeout. After an exception
         * the caller may repeat it, in another process too, as long as the daemon knows the key (retry-window, 300 s).
         *
         * A daemon that is killed forgets its keys. If it had carried out the broadcast before, the next one does so
         * again, in another epoch and not marked as repeated: in this one case clients may get the message twice.
         *
         * @param bool $retry the same for this call alone, with a generated key if none is given
         */
        public function broadcast(string $channel, string $message, ?string $key = null, bool $retry = false): Receipt
        {
            return self::receipt($this->callWithKey('broadcast', [$channel, $message], $key, $retry));
        }

        /** Send bytes, as broadcast() sends a text; browsers get them as a binary message. */
        public function broadcastBinary(
            string $channel,
            string $message,
            ?string $key = null,
            bool $retry = false,
        ): Receipt {
            return self::receipt($this->callWithKey('broadcast', [$channel, new Bytes($message)], $key, $retry));
        }

        /**
         * Send a text to all clients that watch any of the channels; a client that watches several of them gets it
         * once for each. If one channel is refused, nothing is sent. A key applies to this list of channels in this
         * order; otherwise it and $retry are as for broadcast().
         *
         * @param array<string|int> $channels their names; PHP turns an array key like "42" into an int
         * @return list<Receipt> one for each channel, in order
         */
        public function broadcastMany(
            array $channels,
            string $message,
            ?string $key = null,
            bool $retry = false,
        ): array {
            $names = \array_map(static fn (string|int $name): string => (string) $name, \array_values($channels));
            $result = $this->callWithKey('broadcast_many', [$names, $message], $key, $retry);
            if (!\is_array($result) || !\array_is_list($result) || \count($result) !== \count($names)) {
                throw new ProtocolException(
                    "the daemon's answer is not a receipt for each channel: " . quoted($result)
                );
            }
            return \array_map(self::receipt(...), $result);
        }

        /** Return if the daemon answers; throw otherwise. */
        public function ping(): void
        {
            $result = $this->call('ping');
            if ($result !== 'pong') {
                throw new ProtocolException("the daemon's answer to ping is not pong: " . quoted($result));
            }
        }

        /**
         * The channels that have subscribers and whose names begin with the prefix.
         *
         * They come page by page, and the timeout applies to each page. Channels that come or go meanwhile may be among
         * them or not.
         *
         * @return array<ChannelInfo> by name; PHP turns a key like "42" into an int
         */
        public function channels(string $prefix = ''): array
        {
            $channels = [];
            $size = 0;
            $place = [];
            do {
                $answer = self::map($this->call('channels', [['prefix' => $prefix, 'limit' => self::PAGE] + $place]));
                $page = self::map($answer['channels'] ?? null);
                $next = self::next($answer, \count($page), $place['after'] ?? -1);
                $size += self::PAGE_BYTES;
                foreach ($page as $name => $found) {
                    $channels[$name] = self::channel((string) $name, $found);
                    $size += self::CHANNEL_BYTES + \strlen((string) $name);
                }
                if ($size > self::LIST_BYTES) {
                    throw new ProtocolException(
                        'the list of channels takes more than ' . self::LIST_BYTES . ' bytes of memory, the limit;'
                        . ' ask for a part of them, by their prefix'
                    );
                }
                $place = ['after' => $next];
            } while ($next !== null);
            return $channels;
        }

        /**
         * The newest messages that the daemon keeps of the channel, at most $count, and the channel's position. History
         * is bounded in number, age and bytes (docs/protocol.md, 1.4).
         */
        public function history(string $channel, int $count = 100): History
        {
            try {
                $result = $this->call('history', [$channel, $count, ['time' => true]]);
            } catch (RefusedException $refused) {
                if ($refused->getErrorCode() !== 'invalid_params') {
                    throw $refused;
                }
                $result = $this->call('history', [$channel, $count]); // for a daemon that does not know times
            }
            $messages = \is_array($result) ? $result['messages'] ?? null : null;
            if (!\is_array($messages) || !\array_is_list($messages)) {
                throw self::unusable($result, 'messages');
            }
            if (\count($messages) > $count) {
                throw new ProtocolException(
                    'the daemon sent ' . \count($messages) . " messages where {$count} were asked for"
                );
            }
            return new History(
                self::text($result, 'epoch'),
                self::count($result, 'offset'),
                \array_map(self::message(...), $messages),
            );
        }

        /**
         * The daemon's counters, which docs/operations.md explains.
         *
         * @return array<mixed>
         */
        public function stats(): array
        {
            return self::map($this->call('stats'));
        }

        /**
         * The daemon's version, limits and start time.
         *
         * @return array<mixed>
         */
        public function info(): array
        {
            return self::map($this->call('info'));
        }

        /**
         * Call any method of docs/protocol.md, and return its result as PHP values; bytes are {@see Bytes}.
         *
         * @param array<mixed> $params
         */
        public function call(string $method, array $params = []): mixed
        {
            return $this->request($method, $params, repeatable: false);
        }

        /** @param list<mixed> $params */
        private function callWithKey(string $method, array $params, ?string $key, bool $retry): mixed
        {
            $key ??= $retry ? \bin2hex(\random_bytes(self::KEY_BYTES)) : null;
            return $this->request($method, $key === null ? $params : [...$params, $key], repeatable: $key !== null);
        }

        /**
         * Send a request and return its result. If the daemon hangs up before, send a repeatable request again.
         *
         * @param array<mixed> $params
         */
        private function request(string $method, array $params, bool $repeatable): mixed
        {
            $deadline = new Deadline($this->timeout);
            $id = $this->nextId;
            $this->nextId = ($id + 1) % self::ID_LIMIT;
            $request = MessagePack::pack([0, $id, $method, \array_values($params)]);
            $connection = $this->begin($request, $deadline);
            while (true) {
                $reusable = false;
                try {
                    [$error, $result] = $connection->answer($id, $deadline);
                    $reusable = $connection->isReusable();
                    break;
                } catch (ProtocolException $broken) {
                    if (!$repeatable || !$connection->hasHungUp()) {
                        throw $broken;
                    }
                } finally {
                    if ($reusable) {
                        $this->connection = $connection;
                    } else {
                        $connection->close();
                    }
                }
                $connection = $this->beginAgain($request, $deadline, $broken);
            }
            if ($error !== null) {
                throw self::refusal($error);
            }
            return $result;
        }

        /** Close the connection. The next call opens another. */
        public function close(): void
        {
            $this->connection?->close();
            $this->connection = null;
        }

        /** Find a connection that takes the request: the kept one if it still works, else a new one. */
        private function begin(string $request, Deadline $deadline): Connection
        {
            // During a call the connection is not kept: a signal handler that makes another call in the middle opens
            // its own, and one that throws leaves no connection behind that owes an answer.
            $kept = $this->connection;
            $this->connection = null;
            if ($kept !== null) {
                if ($kept->begin($request)) {
                    return $kept;
                }
                $kept->close();
            }
            $connection = Connection::open($this->socket, $deadline);
            if (!$connection->begin($request)) {
                $connection->close();
                throw new NoDaemonException("the daemon at {$this->socket} hung up at once; nothing was sent");
            }
            return $connection;
        }

        /** Begin a request again after its connection broke; if there is no daemon, wait for one until the deadline. */
        private function beginAgain(string $request, Deadline $deadline, ProtocolException $broken): Connection
        {
            $cause = null;
            while (true) {
                \usleep(\min(self::REPEAT_MICROSECONDS, $deadline->left()));
                if ($deadline->left() === 0) {
                    $why = $cause === null ? 'the connection broke each time' : 'no connection could be made';
                    throw new ProtocolException(
                        "{$broken->getMessage()}. It could not be repeated within {$deadline->seconds} s: {$why}",
                        previous: $cause
                    );
                }
                try {
                    return $this->begin($request, $deadline);
                } catch (NoDaemonException | TimeoutException $error) {
                    $cause = $error;
                }
            }
        }

        // How results are read. A newer daemon may send more than this client knows; missing fields are an error.

        private static function receipt(mixed $result): Receipt
        {
            return new Receipt(
                self::count($result, 'recipients'),
                self::text($result, 'epoch'),
                self::count($result, 'offset'),
                self::flag($result, 'repeated'),
            );
        }

        private static function channel(string $name, mixed $found): ChannelInfo
        {
            return new ChannelInfo(
                $name,
                self::count($found, 'subscribers'),
                self::text($found, 'epoch'),
                self::count($found, 'offset'),
                self::count($found, 'history'),
            );
        }

        /**
         * Where the next page begins, or null. The page at hand has $members members and was asked for with $after.
         *
         * @param array<mixed> $answer
         */
        private static function next(array $answer, int $members, int $after): ?int
        {
            if ($members > self::PAGE) {
                throw new ProtocolException(
                    "the daemon sent a page of {$members} where " . self::PAGE . ' were asked for'
                );
            }
            $next = ($answer['next'] ?? null) === null ? null : self::count($answer, 'next');
            if ($next !== null && $next <= $after) {
                throw new ProtocolException("the daemon's pages do not go on: behind {$after} comes {$next}");
            }
            return $next;
        }

        /** The daemon's words appear in the exception on one line, and cut. */
        private static function refusal(mixed $error): RefusedException
        {
            $code = self::text($error, 'code');
            if (\preg_match('/^[!-~]{1,64}$/D', $code) !== 1) {
                throw self::unusable($error, 'code');
            }
            return new RefusedException($code, printable(self::text($error, 'message'), self::SAID_BYTES));
        }

        private static function message(mixed $kept): Message
        {
            $offset = \is_array($kept) ? $kept[0] ?? null : null;
            $message = \is_array($kept) ? $kept[1] ?? null : null;
            $time = \is_array($kept) && isset($kept[2]) ? self::time($kept[2]) : null;
            $numbered = \is_int($offset) && $offset >= 0;
            return match (true) {
                $numbered && \is_string($message) && isText($message) => new Message($offset, $message, false, $time),
                $numbered && $message instanceof Bytes => new Message($offset, $message->bytes, true, $time),
                default => throw new ProtocolException(
                    "the daemon's history has an entry that is not a message: " . quoted($kept)
                ),
            };
        }

        /** @return array<mixed> */
        private static function map(mixed $result): array
        {
            if (!\is_array($result) || ($result !== [] && \array_is_list($result))) {
                throw new ProtocolException("the daemon's answer is not a map: " . quoted($result));
            }
            return $result;
        }

        private static function count(mixed $map, string $name): int
        {
            $value = \is_array($map) ? $map[$name] ?? null : null;
            return \is_int($value) && $value >= 0 ? $value : throw self::unusable($map, $name);
        }

        private static function text(mixed $map, string $name): string
        {
            $value = \is_array($map) ? $map[$name] ?? null : null;
            return \is_string($value) && isText($value) ? $value : throw self::unusable($map, $name);
        }

        /** A field that is sent only when it is true. */
        private static function flag(mixed $map, string $name): bool
        {
            $value = \is_array($map) ? $map[$name] ?? false : false;
            return \is_bool($value) ? $value : throw self::unusable($map, $name);
        }

        /** The time of publication in seconds, from the map that the daemon sends with a message. */
        private static function time(mixed $more): float
        {
            $milliseconds = \is_array($more) ? $more['time'] ?? null : null;
            return \is_int($milliseconds) ? $milliseconds / 1000.0 : throw self::unusable($more, 'time');
        }

        private static function unusable(mixed $map, string $name): ProtocolException
        {
            return new ProtocolException("the daemon's answer has no usable '{$name}': " . quoted($map));
        }
    }

    /**
     * Send a text to all clients that watch the channel, and return once the daemon has taken it.
     *
     * The connection is kept for the next call: one for each process and socket. For the key and $retry see
     * {@see Client::broadcast()}.
     *
     * @throws RealtimeException
     */
    function broadcast(string $channel, string $message, ?string $key = null, bool $retry = false): Receipt
    {
        /** @var array<string, Client> $clients */
        static $clients = [];
        $socket = Client::defaultSocket();
        $client = $clients[$socket] ??= new Client($socket);
        return $client->broadcast($channel, $message, $key, $retry);
    }

    // Everything below is internal and may change.

    /**
     * A moment at which all waiting ends.
     *
     * @internal
     */
    final class Deadline
    {
        private const NANOSECONDS = 1_000_000_000;

        /** Practically no limit, and nanoseconds still fit into an int. */
        private const MOST_SECONDS = 1e9;

        private readonly int $at;

        public function __construct(public readonly float $seconds)
        {
            $this->at = \hrtime(true) + (int) (\min($seconds, self::MOST_SECONDS) * self::NANOSECONDS);
        }

        /** Microseconds until then, or 0. */
        public function left(): int
        {
            return \max(0, \intdiv($this->at - \hrtime(true), 1000));
        }
    }

    /**
     * A connected socket that never blocks, with one request on its way through it at a time.
     *
     * @internal
     */
    final class Connection
    {
        /** Bytes of a Unix socket's path, without the closing zero byte (unix(7), sun_path). */
        private const PATH_LIMIT = 107;

        /** How long to wait before trying again when the daemon's queue of new connections is full. */
        private const RETRY_MICROSECONDS = 10_000;

        /**
         * How long PHP may wait in one read where stream_select() cannot be used. A signal's handler runs afterwards,
         * and repeated signals may prolong the wait.
         */
        private const SLICE_MICROSECONDS = 2_000;

        /** The functions that this client needs, of those that an administrator may remove with disable_functions. */
        private const NEEDED = [
            'stream_socket_client', 'stream_set_blocking', 'stream_set_timeout', 'stream_set_read_buffer',
            'stream_get_meta_data', 'fread', 'fwrite', 'fclose', 'usleep',
        ];

        private const READ_BYTES = 64 * 1024;

        private const WRITE_BYTES = 256 * 1024;

        /** Bytes of the daemon's last words that an exception shows, and of their code. */
        private const SAID_BYTES = 1000;
        private const CODE_BYTES = 64;

        // errno(3) of Linux.
        private const ENOENT = 2;
        private const EINTR = 4;
        private const EAGAIN = 11;
        private const EACCES = 13;
        private const ECONNREFUSED = 111;

        private string $request = '';

        /** How many bytes of the request the kernel has taken; they cannot be taken back. */
        private int $sent = 0;

        /** The daemon takes no more bytes. What it sent before may still be there to read. */
        private bool $deaf = false;

        private bool $reusable = true;

        /** The daemon has hung up, or has died, before it answered. */
        private bool $hungUp = false;

        /** Whether stream_select() can be used: not for descriptors from 1024 on, nor where it is disabled. */
        private bool $selectable;

        /** Bytes read while waiting, to be received first; '' if that was the end of the stream. */
        private ?string $early = null;

        /** 0 if PHP may not ask for it. */
        private readonly int $pid;

        /** @param resource $stream */
        private function __construct(private $stream, private readonly string $path)
        {
            \stream_set_blocking($stream, false);
            \stream_set_read_buffer($stream, 0);
            $this->selectable = \function_exists('stream_select');
            $this->pid = self::processId();
        }

        private static function processId(): int
        {
            return match (true) {
                \function_exists('getmypid') => (int) \getmypid(),
                \function_exists('posix_getpid') => \posix_getpid(),
                default => 0,
            };
        }

        /** The path alone, from PATH, unix:PATH or, as a URL, unix:///PATH. */
        public static function path(string $written): string
        {
            $path = \str_starts_with($written, 'unix:') ? \substr($written, 5) : $written;
            return \str_starts_with($path, '//') ? '/' . \ltrim($path, '/') : $path;
        }

        /** Why no Unix socket can be at the path, as a clause; null if one can. */
        private static function fault(string $path): ?string
        {
            return match (true) {
                $path === '' || \str_contains($path, "\0") => 'that is not the path of a socket',
                \strlen($path) > self::PATH_LIMIT => 'the path of a socket has at most ' . self::PATH_LIMIT . ' bytes',
                \str_starts_with($path, 'unix/') =>
                    'Caddy writes an address so; here it is ' . quoted(\substr($path, 5)),
                \str_starts_with($path, '@') => 'a socket without a file has no permissions',
                \preg_match('~^([^/]*:[0-9]+|[0-9]+)$~D', $path) === 1 =>
                    'a Unix socket has no port, but a file, whose permissions say who may connect',
                \preg_match('~^[a-z][a-z0-9+.-]*://~i', $path) === 1 => 'it is a path, not a URL',
                default => null,
            };
        }

        public static function open(string $path, Deadline $deadline): self
        {
            $fault = self::fault($path);
            if ($fault !== null) {
                throw new NoDaemonException('no daemon can be at ' . quoted($path) . ": {$fault}; see REALTIME_SOCKET");
            }
            foreach (self::NEEDED as $function) {
                if (!\function_exists($function)) {
                    throw new NoDaemonException(
                        "cannot connect to {$path}: PHP's disable_functions takes away {$function}(), which is needed"
                    );
                }
            }
            while (true) {
                $errno = 0;
                $error = '';
                $left = $deadline->left();
                $stream = self::quietly(static function () use ($path, $left, &$errno, &$error) {
                    return \stream_socket_client("unix://{$path}", $errno, $error, $left / 1e6);
                });
                if ($stream !== false) {
                    return new self($stream, $path);
                }
                if ($errno !== self::EAGAIN) {
                    throw new NoDaemonException(self::whyNot($path, $errno, $error));
                }
                // The daemon's queue of new connections is full, and the kernel does not report when it has space.
                if ($left === 0) {
                    throw new TimeoutException(
                        "the daemon at {$path} did not accept the connection within {$deadline->seconds} s;"
                        . ' nothing was sent'
                    );
                }
                \usleep(\min(self::RETRY_MICROSECONDS, $left));
            }
        }

        /**
         * Begin to send a request, if this connection is ours and open and has nothing to be read.
         *
         * Returns false if no byte of it was sent, nor will be.
         */
        public function begin(string $request): bool
        {
            $this->request = $request;
            $this->sent = 0;
            if ($this->pid !== self::processId()) {
                return false; // after a fork it is the parent's
            }
            [$readable] = $this->wait(0);
            if ($readable) {
                return false; // the end of the stream, or last words before it
            }
            $this->send();
            return !$this->deaf;
        }

        /**
         * Send the rest of the request, and wait for its answer.
         *
         * @return array{mixed, mixed} the error, null if there is none, and the result
         */
        public function answer(int $id, Deadline $deadline): array
        {
            $unpacker = new Unpacker(fn (): string => $this->receive($deadline));
            while (true) {
                try {
                    $message = $unpacker->next();
                } catch (\UnexpectedValueException $error) {
                    throw $this->strange($error->getMessage(), $error);
                } catch (\LengthException $error) {
                    throw new ProtocolException("the daemon at {$this->path} sent {$error->getMessage()}");
                }
                if (!\is_array($message) || !\array_is_list($message)) {
                    throw $this->strange(quoted($message));
                }
                if (\count($message) === 3 && $message[0] === 2) {
                    continue; // a notification: call() was used to subscribe, and there is nowhere to deliver it
                }
                if (\count($message) !== 4 || $message[0] !== 1) {
                    throw $this->strange(quoted($message));
                }
                [, $answered, $error, $result] = $message;
                if ($answered === null) {
                    throw new ProtocolException(
                        "the daemon at {$this->path} ended the connection: " . self::lastWords($error)
                    );
                }
                if ($answered !== $id) {
                    throw $this->strange('an answer to request ' . quoted($answered) . ', which awaits none');
                }
                $this->reusable = $this->isSent() && $unpacker->isEmpty();
                return [$error, $result];
            }
        }

        /** Whether another request may be sent: not if the last one was refused before all of it was sent. */
        public function isReusable(): bool
        {
            return $this->reusable;
        }

        /** Whether the daemon hung up before it answered, without giving a reason. */
        public function hasHungUp(): bool
        {
            return $this->hungUp;
        }

        public function close(): void
        {
            \fclose($this->stream);
        }

        private function isSent(): bool
        {
            return $this->sent === \strlen($this->request);
        }

        private function send(): void
        {
            $taken = self::quietly(
                fn () => \fwrite($this->stream, \substr($this->request, $this->sent, self::WRITE_BYTES))
            );
            // A write that fails has taken nothing; one that is cut short returns its count.
            if ($taken === false) {
                $this->deaf = true;
            } else {
                $this->sent += $taken;
            }
        }

        /** Wait for the next bytes of the answer, and meanwhile send the rest of the request. */
        private function receive(Deadline $deadline): string
        {
            while (true) {
                $left = $deadline->left();
                if ($left === 0) {
                    throw new TimeoutException(
                        "the daemon at {$this->path} did not answer within {$deadline->seconds} s; "
                        . ($this->sent === 0 ? 'nothing was sent' : 'what was asked may still be carried out')
                    );
                }
                [$readable, $writable] = $this->wait($left, !$this->isSent() && !$this->deaf);
                if ($writable) {
                    $this->send();
                }
                if ($readable) {
                    $data = $this->early ?? self::quietly(fn () => \fread($this->stream, self::READ_BYTES));
                    $this->early = null;
                    if ($data !== false && $data !== '') {
                        return $data;
                    }
                    $this->hungUp = true;
                    throw new ProtocolException(
                        "the daemon at {$this->path} hung up before it answered;"
                        . ' what was asked may have been carried out, or not'
                    );
                }
            }
        }

        /**
         * Wait until the connection can be read or written.
         *
         * @return array{bool, bool} whether it can be read and written; neither if the time is up or a signal came
         */
        private function wait(int $microseconds, bool $toWrite = false): array
        {
            if (!$this->selectable) {
                return $this->waitInSlices($microseconds, $toWrite);
            }
            $read = [$this->stream];
            $write = $toWrite ? [$this->stream] : [];
            $except = [];
            $seconds = \intdiv($microseconds, 1_000_000);
            $ready = self::quietly(static function () use (&$read, &$write, &$except, $seconds, $microseconds) {
                return \stream_select($read, $write, $except, $seconds, $microseconds % 1_000_000);
            }, $warning);
            if ($ready !== false) {
                return [$read !== [], $write !== []];
            }
            $this->selectable = \str_contains($warning ?? '', '[' . self::EINTR . ']');
            return [false, false];
        }

        /**
         * Wait as wait() does, but no longer than a moment, and read the available bytes.
         *
         * A blocking read uses poll(2), which has no largest descriptor. Whether the connection can be written has to
         * be tried.
         *
         * @return array{bool, bool}
         */
        private function waitInSlices(int $microseconds, bool $toWrite): array
        {
            if ($microseconds > 0) {
                \stream_set_timeout($this->stream, 0, \min($microseconds, self::SLICE_MICROSECONDS));
                \stream_set_blocking($this->stream, true);
            }
            try {
                $data = self::quietly(fn () => \fread($this->stream, self::READ_BYTES));
            } finally {
                \stream_set_blocking($this->stream, false);
            }
            if ($data !== false && $data !== '') {
                $this->early = $data;
            } elseif (\stream_get_meta_data($this->stream)['eof']) {
                $this->early = '';
            }
            return [$this->early !== null, $toWrite];
        }

        private function strange(string $what, ?\Throwable $cause = null): ProtocolException
        {
            return new ProtocolException(
                "the daemon at {$this->path} sent what is not its protocol: {$what}. Is this realtimed's --socket?",
                previous: $cause
            );
        }

        private static function lastWords(mixed $error): string
        {
            $isError = \is_array($error) && \is_string($error['code'] ?? null) && \is_string($error['message'] ?? null);
            if (!$isError) {
                return quoted($error);
            }
            $code = printable($error['code'], self::CODE_BYTES);
            return printable($error['message'], self::SAID_BYTES) . " ({$code})";
        }

        /** Say why nothing could be reached at a path, and what to check. */
        private static function whyNot(string $path, int $errno, string $error): string
        {
            if ($errno === self::ENOENT) {
                return "no daemon at {$path}: there is no such file. Is realtimed running, and is this its --socket?"
                    . ' Clients look where REALTIME_SOCKET says'
                    . (\preg_match('~^/(var/)?tmp/~', $path) ? '. A service with PrivateTmp sees another /tmp' : '');
            }
            $status = self::look($path);
            $refused = $errno === self::ECONNREFUSED || $errno === self::EACCES;
            if ($refused && \is_array($status) && ($status['mode'] & 0170000) !== 0140000) {
                return "no daemon at {$path}: this file is not a socket";
            }
            if ($errno === self::ECONNREFUSED) {
                if (!\is_array($status)) {
                    return "no daemon at {$path}: nothing listens there. The socket is left from a daemon that has"
                        . ' ended, or the file is not a socket';
                }
                return "no daemon at {$path}: the socket is left from one that has ended."
                    . ' Start realtimed, which replaces it';
            }
            if ($errno === self::EACCES) {
                $user = \function_exists('posix_geteuid') ? self::userName(\posix_geteuid()) : 'that PHP runs as';
                if ($status === null) {
                    return "cannot open {$path}: the user {$user} may not write to this socket, or may not enter a"
                        . ' directory on the way';
                }
                if ($status === false) {
                    return "cannot reach {$path}: the user {$user} may not enter a directory on the way";
                }
                $mode = \sprintf('%04o', $status['mode'] & 07777);
                return "cannot open {$path}: the user {$user} may not write to this socket, which has mode {$mode},"
                    . ' owner ' . self::userName($status['uid']) . ' and group ' . self::groupName($status['gid'])
                    . '. Add the user to the group, or start realtimed with another --socket-group or --socket-mode';
            }
            if ($errno === 0) { // no socket could be made, and PHP does not say why
                $error .= '. That happens when too many files are open (ulimit -n)';
            }
            return "cannot connect to {$path}: {$error}";
        }

        /**
         * Look at a file.
         *
         * @return array<mixed>|false|null the result of stat(), or null if PHP's settings (open_basedir,
         *     disable_functions) do not allow it
         */
        private static function look(string $path): array|false|null
        {
            if (!\function_exists('stat')) {
                return null;
            }
            if (\function_exists('clearstatcache')) {
                \clearstatcache(true, $path);
            }
            $status = self::quietly(static fn () => \stat($path), $warning);
            return $status === false && \str_contains($warning ?? '', 'open_basedir') ? null : $status;
        }

        private static function userName(int $uid): string
        {
            $user = \function_exists('posix_getpwuid') ? \posix_getpwuid($uid) : false;
            return $user === false ? (string) $uid : $user['name'];
        }

        private static function groupName(int $gid): string
        {
            $group = \function_exists('posix_getgrgid') ? \posix_getgrgid($gid) : false;
            return $group === false ? (string) $gid : $group['name'];
        }

        /**
         * Do something that PHP may warn about, and keep the warning from the application.
         *
         * An @ is not enough: the application's error handler may ignore it.
         *
         * @template T
         * @param \Closure(): T $operation
         * @param-out string|null $warning
         * @return T
         */
        private static function quietly(\Closure $operation, ?string &$warning = null): mixed
        {
            $warning = null;
            \set_error_handler(static function (int $level, string $text) use (&$warning): bool {
                $warning = $text;
                return true;
            });
            try {
                return $operation();
            } finally {
                \restore_error_handler();
            }
        }
    }

    /**
     * Turns values into MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md).
     *
     * @internal
     */
    final class MessagePack
    {
        /** Every string becomes a str, whatever its bytes; {@see Bytes} become a bin. A list becomes an array. */
        public static function pack(mixed $value): string
        {
            return match (true) {
                $value === null => "\xc0",
                $value === false => "\xc2",
                $value === true => "\xc3",
                \is_int($value) => self::packInt($value),
                \is_float($value) => \pack('CE', 0xcb, $value),
                \is_string($value) => self::header(\strlen($value), 0xa0, 32, 0xd9, 0xda, 0xdb) . $value,
                $value instanceof Bytes => self::header(\strlen($value->bytes), 0, 0, 0xc4, 0xc5, 0xc6) . $value->bytes,
                \is_array($value) => self::packArray($value),
                default => throw new \TypeError('no MessagePack is made of ' . \get_debug_type($value)),
            };
        }

        private static function packInt(int $value): string
        {
            return match (true) {
                $value >= 2 ** 32 => \pack('CJ', 0xcf, $value),
                $value >= 2 ** 16 => \pack('CN', 0xce, $value),
                $value >= 2 ** 8 => \pack('Cn', 0xcd, $value),
                $value >= 2 ** 7 => \pack('CC', 0xcc, $value),
                $value >= -(2 ** 5) => \pack('c', $value),
                $value >= -(2 ** 7) => \pack('Cc', 0xd0, $value),
                $value >= -(2 ** 15) => \pack('Cn', 0xd1, $value),
                $value >= -(2 ** 31) => \pack('CN', 0xd2, $value),
                default => \pack('CJ', 0xd3, $value),
            };
        }

        /** @param array<mixed> $value */
        private static function packArray(array $value): string
        {
            if (\array_is_list($value)) {
                return self::header(\count($value), 0x90, 16, null, 0xdc, 0xdd)
                    . \implode('', \array_map(self::pack(...), $value));
            }
            $packed = self::header(\count($value), 0x80, 16, null, 0xde, 0xdf);
            foreach ($value as $key => $item) {
                $packed .= self::pack($key) . self::pack($item);
            }
            return $packed;
        }

        /**
         * The header of a value: its type and length.
         *
         * A length below `$short` goes into the byte `$type`; longer ones follow `$byte8`, `$byte16` or `$byte32`, in
         * as many bits.
         */
        private static function header(
            int $length,
            int $type,
            int $short,
            ?int $byte8,
            int $byte16,
            int $byte32,
        ): string {
            return match (true) {
                $length < $short => \chr($type | $length),
                $byte8 !== null && $length < 2 ** 8 => \pack('CC', $byte8, $length),
                $length < 2 ** 16 => \pack('Cn', $byte16, $length),
                $length < 2 ** 32 => \pack('CN', $byte32, $length),
                default => throw new \LengthException('MessagePack has no lengths of 4 GiB and more'),
            };
        }
    }

    /**
     * Turns a stream of MessagePack into values, and fetches the stream's bytes as it needs them.
     *
     * @internal
     */
    final class Unpacker
    {
        /**
         * Bytes of memory that an answer may take; PHP's memory_limit is commonly 128 MiB.
         */
        private const SIZE_LIMIT = 48 * 2 ** 20;

        // About how many of them a value takes in the array that it is in, a string beside its bytes, and an array that
        // is not empty beside its values.
        private const VALUE_BYTES = 40;
        private const STRING_BYTES = 40;
        private const ARRAY_BYTES = 400;

        private const DEPTH_LIMIT = 64;

        // The unread part is `$buffer` from `$at` on.
        private string $buffer = '';
        private int $at = 0;

        /** Bytes of memory that the answer takes so far, including everything its headers announce. */
        private int $size = 0;

        /** @param \Closure(): string $more returns the next bytes, at least one */
        public function __construct(private readonly \Closure $more)
        {
        }

        /** Whether everything received has been read. */
        public function isEmpty(): bool
        {
            return $this->at === \strlen($this->buffer);
        }

        /**
         * Read the next answer; bin becomes {@see Bytes}.
         *
         * @throws \UnexpectedValueException for bytes that are not MessagePack, or values that PHP cannot hold
         * @throws \LengthException for an answer that would take too much memory
         */
        public function next(): mixed
        {
            $this->size = 0;
            return $this->value(0);
        }

        private function value(int $depth): mixed
        {
            $type = $this->unsigned('C', 1);
            return match (true) {
                $type < 0x80 => $type,
                $type < 0x90 => $this->map($type & 0x0f, $depth),
                $type < 0xa0 => $this->list($type & 0x0f, $depth),
                $type < 0xc0 => $this->string($type & 0x1f),
                $type >= 0xe0 => $type - 2 ** 8,
                default => match ($type) {
                    0xc0 => null,
                    0xc2 => false,
                    0xc3 => true,
                    0xc4 => new Bytes($this->string($this->unsigned('C', 1))),
                    0xc5 => new Bytes($this->string($this->unsigned('n', 2))),
                    0xc6 => new Bytes($this->string($this->unsigned('N', 4))),
                    0xca => \unpack('G', $this->bytes(4))[1],
                    0xcb => \unpack('E', $this->bytes(8))[1],
                    0xcc => $this->unsigned('C', 1),
                    0xcd => $this->unsigned('n', 2),
                    0xce => $this->unsigned('N', 4),
                    0xcf => $this->unsigned('J', 8),
                    0xd0 => $this->signed('C', 1),
                    0xd1 => $this->signed('n', 2),
                    0xd2 => $this->signed('N', 4),
                    0xd3 => $this->signed('J', 8),
                    0xd9 => $this->string($this->unsigned('C', 1)),
                    0xda => $this->string($this->unsigned('n', 2)),
                    0xdb => $this->string($this->unsigned('N', 4)),
                    0xdc => $this->list($this->unsigned('n', 2), $depth),
                    0xdd => $this->list($this->unsigned('N', 4), $depth),
                    0xde => $this->map($this->unsigned('n', 2), $depth),
                    0xdf => $this->map($this->unsigned('N', 4), $depth),
                    0xc1 => throw new \UnexpectedValueException('the byte 0xc1, which has no meaning in MessagePack'),
                    default => throw new \UnexpectedValueException('an extension type of MessagePack'),
                },
            };
        }

        /** @return list<mixed> */
        private function list(int $count, int $depth): array
        {
            $this->announce($count, 1, $depth);
            $list = [];
            for ($i = 0; $i < $count; $i++) {
                $list[] = $this->value($depth + 1);
            }
            return $list;
        }

        /** @return array<mixed> */
        private function map(int $count, int $depth): array
        {
            $this->announce($count, 2, $depth);
            $map = [];
            for ($i = 0; $i < $count; $i++) {
                $key = $this->value($depth + 1);
                if (!\is_int($key) && !\is_string($key)) {
                    throw new \UnexpectedValueException('a map with a key that PHP cannot have: ' . quoted($key));
                }
                $map[$key] = $this->value($depth + 1);
            }
            return $map;
        }

        /** Count an array of so many elements with so many values each. */
        private function announce(int $count, int $values, int $depth): void
        {
            if ($depth > self::DEPTH_LIMIT) {
                throw new \UnexpectedValueException('arrays in arrays, too deep');
            }
            $this->grow(($count > 0 ? self::ARRAY_BYTES : 0) + $count * $values * self::VALUE_BYTES);
        }

        private function string(int $length): string
        {
            $this->grow(self::STRING_BYTES + 2 * $length); // it exists twice while it is cut out of the buffer
            $string = $this->bytes($length);
            $this->size -= $length;
            return $string;
        }

        private function grow(int $bytes): void
        {
            $this->size += $bytes;
            if ($this->size > self::SIZE_LIMIT) {
                throw new \LengthException(
                    'an answer that is too large: it takes more than ' . self::SIZE_LIMIT . ' bytes of memory, the'
                    . ' limit; ask for less at a time'
                );
            }
        }

        private function signed(string $format, int $width): int
        {
            $value = \unpack($format, $this->bytes($width))[1];
            return $width < 8 && $value >= 2 ** (8 * $width - 1) ? $value - 2 ** (8 * $width) : $value;
        }

        private function unsigned(string $format, int $width): int
        {
            $value = \unpack($format, $this->bytes($width))[1];
            if ($value < 0) {
                throw new \UnexpectedValueException('an integer above PHP_INT_MAX');
            }
            return $value;
        }

        private function bytes(int $length): string
        {
            if (\strlen($this->buffer) - $this->at < $length) {
                $this->buffer = \substr($this->buffer, $this->at);
                $this->at = 0;
                do {
                    $this->buffer .= ($this->more)();
                } while (\strlen($this->buffer) < $length);
            }
            $bytes = \substr($this->buffer, $this->at, $length);
            $this->at += $length;
            return $bytes;
        }
    }

    /**
     * A value as an error shows it: in printable ASCII, and short.
     *
     * @internal
     */
    function quoted(mixed $value): string
    {
        $room = 61;
        $options = \JSON_PARTIAL_OUTPUT_ON_ERROR | \JSON_INVALID_UTF8_SUBSTITUTE | \JSON_UNESCAPED_SLASHES;
        $shown = \str_replace("\x7f", '\u007f', (string) \json_encode(cut($value, $room), $options));
        return \strlen($shown) <= 60 ? $shown : \substr($shown, 0, 60) . '...';
    }

    /**
     * The beginning of a value: at least the part that may be shown.
     *
     * @internal
     * @param int $room how many characters are left to show
     */
    function cut(mixed $value, int &$room): mixed
    {
        $value = $value instanceof Bytes ? $value->bytes : $value;
        $room -= 1;
        if (\is_string($value)) {
            $beginning = \substr($value, 0, 61);
            $room -= \strlen($beginning);
            return $beginning;
        }
        if (!\is_array($value)) {
            return $value;
        }
        $beginning = [];
        foreach ($value as $key => $item) {
            if ($room <= 0) {
                break;
            }
            $beginning[\is_string($key) ? cut($key, $room) : $key] = cut($item, $room);
        }
        return $beginning;
    }

    /**
     * A text as an error shows it: on one line, without control over a terminal, and cut to so many bytes. Unprintable
     * characters are shown as bytes.
     *
     * @internal
     */
    function printable(string $text, int $limit): string
    {
        if (\strlen($text) > $limit) {
            $text = \preg_replace('/[\xc0-\xff][\x80-\xbf]*$/D', '', \substr($text, 0, $limit)) . '...';
        }
        $shown = \preg_replace_callback(
            '/[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u',
            static fn (array $found): string => '\x' . \bin2hex($found[0]),
            $text
        );
        return $shown ?? quoted($text);
    }

    /**
     * Whether a string is UTF-8.
     *
     * @internal
     */
    function isText(string $text): bool
    {
        return \preg_match('//u', $text) === 1;
    }
}

namespace {

    if (!\function_exists('broadcast')) {
        /**
         * Send a text to all clients that watch the channel, and return once the daemon has taken it.
         *
         * @throws Realtime\RealtimeException
         */
        function broadcast(string $channel, string $message): void
        {
            Realtime\broadcast($channel, $message);
        }
    }
}
