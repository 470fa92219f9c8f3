/* The load client: thousands of WebSocket subscribers and one publisher in one process.
 *
 * Strategy. Each thread reads its share of the connections through io_uring or, without it, through edge-triggered epoll
 * into one large buffer, and only walks over frame headers. A message begins with eight digits, its number, so every
 * frame that arrives is checked: the numbers a subscriber sees must rise, and in the end each must have received exactly
 * its messages. A message is in flight until the last of its channel's subscribers, however many they are, has all of
 * it. The thread that receives this last delivery publishes the next message, which keeps a fixed number in flight (a
 * closed loop). Times of sending and of arrival come from the same clock.
 *
 * The differences between servers (request, subscription, publication) are templates in hexadecimal, in which ########
 * stands for the number of a channel. Redis and Mercure do not speak WebSocket and have frames of a fixed form instead.
 * Centrifugo joins messages that wait for one client into one WebSocket frame, with a line feed between them.
 *
 * It obeys lines on standard input, "run WINDOW SECONDS MESSAGES" and end of file, and answers with lines of JSON. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "ring.h"

#define READ_BYTES (1 << 20)
#define EVENTS 512
#define DIGITS 8             /* of a message's number and of a channel's */
#define WINDOW_MAX 65536     /* messages in flight; a power of two */
#define HEADER_MAX 128       /* frame header, what a server puts before the message, and the number */
#define CONNECT_SECONDS 120
#define PROBE_SECONDS 2
#define STALL_SECONDS 10     /* without any delivery, after which a run is given up */
#define PING_INTERVAL_MS 10

typedef struct { uint8_t *bytes; size_t size; } Template;

/* A histogram of nanoseconds with 64 steps for each power of two: off by less than 1.6 %. */
typedef struct { uint64_t count, max, steps[64 * 64]; } Histogram;

enum state { UNUSED, CONNECTING, GREETING, OPEN, CLOSED };

typedef struct {
    int fd;
    int number;
    enum state state;
    bool stalled;            /* subscribes and then never reads */
    bool counted;            /* the frame at hand is a message, not a ping or an answer */
    uint8_t crlf;            /* how much of "\r\n\r\n" has been matched */
    uint8_t held;            /* bytes in `header` */
    uint32_t message;        /* number of the message at hand */
    uint32_t last;           /* number of the last message, plus one */
    uint64_t rest;           /* bytes of the frame or joined message at hand that are still to come */
    uint64_t joined;         /* bytes of further messages in the same frame */
    uint64_t started;        /* when connect was called */
    uint8_t header[HEADER_MAX];
} Connection;

typedef struct {
    pthread_t thread;
    int epoll;               /* who connects, and the publisher; everyone where there is no ring */
    Ring ring;               /* its fd is -1 where there is none */
    Connection *connections;
    int count;
    uint8_t *buffer;
    Histogram deliveries, handshakes;
    uint64_t received, bytes, reads, disordered;
} Reader;

/* Set by the command line, then constant. */
static struct sockaddr_storage server_address, publish_address;
static socklen_t server_length, publish_length;
static int clients = 1, stalled, threads = 1, channels = 1, channels_each = 1, concurrent = 256, size = 128;
static int payload_at;                   /* where in a frame's payload the message begins, at least */
static int payload_tail = -1;            /* bytes after the message, where those before it vary in length */
static int joined_tail = -1;             /* bytes behind the message, where frames may hold several */
static int fixed_header;                 /* frames of a fixed form: bytes before the message */
static const char *status = "101";       /* of the answer to the request; empty where that is not HTTP */
static int greeting_bytes;               /* behind the head of that answer, or all of it */
static bool publishes, pings;
static Template request, subscription, prefix, suffix;
static uint32_t *audiences;              /* of the channels: subscribers that read */

/* Written with `lock` held, unless atomic. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static Reader *readers;
static int opened, begun, closed;        /* atomic */
static uint32_t arrived[WINDOW_MAX];     /* atomic: deliveries of the message with that number, modulo */
static uint64_t sent_at[WINDOW_MAX];
static uint32_t first, published, completed, last_wanted;
static uint64_t expected;                /* deliveries of the messages published in this run */
static uint64_t run_until, last_completion;
static bool running;
static Histogram completions;
static int publisher = -1;
static uint8_t *outgoing;
static size_t outgoing_start, outgoing_end, outgoing_room;
static char reply[160];                  /* the beginning of what the publisher was answered */
static size_t reply_size;
static Histogram pongs;

static void fail(const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || *c < ' ')
            *c = ' ';
    printf("{\"event\": \"failed\", \"reason\": \"%s\"}\n", text);
    fflush(stdout);
    _exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double seconds_of(clockid_t clock)
{
    struct timespec t;
    return clock_gettime(clock, &t) ? 0 : (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void record(Histogram *h, uint64_t ns)
{
    int power = ns < 128 ? 0 : 57 - __builtin_clzll(ns);
    h->steps[(power << 6) + (int)(ns >> power)]++;   /* ns >> power is 64 to 127, so the powers join on */
    h->count++;
    if (ns > h->max)
        h->max = ns;
}

static void merge(Histogram *into, const Histogram *from)
{
    for (int i = 0; i < 64 * 64; i++)
        into->steps[i] += from->steps[i];
    into->count += from->count;
    if (from->max > into->max)
        into->max = from->max;
}

static double milliseconds(const Histogram *h, double share)
{
    uint64_t wanted = (uint64_t)((double)h->count * share), seen = 0;
    if (share >= 1)
        return (double)h->max / 1e6;
    for (int i = 0; i < 64 * 64; i++) {
        seen += h->steps[i];
        if (seen > wanted) {
            int power = i < 128 ? 0 : (i >> 6) - 1;
            return (double)((uint64_t)(i - (power << 6)) << power) / 1e6;
        }
    }
    return (double)h->max / 1e6;
}

static void print_histogram(const char *name, const Histogram *h)
{
    printf(", \"%s\": {\"p50\": %.4f, \"p90\": %.4f, \"p99\": %.4f, \"max\": %.4f}", name, milliseconds(h, .5),
           milliseconds(h, .9), milliseconds(h, .99), milliseconds(h, 1));
}

/* Put eight digits over each ######## of a template that was copied to `bytes`. */
static void fill_in(uint8_t *bytes, size_t count, int channel)
{
    char digits[16];
    uint8_t *at = bytes;
    snprintf(digits, sizeof digits, "%08d", channel);
    while ((at = memmem(at, count - (size_t)(at - bytes), "########", DIGITS)))
        memcpy(at, digits, DIGITS);
}

/* Return the channel of a client's subscription. */
static int channel_of(int client, int subscription_number)
{
    return (int)(((long)client * channels_each + subscription_number) % channels);
}

static void watch(int epoll, int fd, void *owner, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = owner};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
}

/* ---- Publishing ---- */

/* Only while something waits: else every message that the server takes would wake us for nothing. */
static void watch_for_room(bool wanted)
{
    static bool watched;
    if (wanted == watched)
        return;
    struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0) | EPOLLET};
    if (epoll_ctl(readers[0].epoll, EPOLL_CTL_MOD, publisher, &event))
        fail("epoll_ctl: %s", strerror(errno));
    watched = wanted;
}

static void flush_publisher(void)
{
    while (outgoing_start < outgoing_end) {
        ssize_t n = send(publisher, outgoing + outgoing_start, outgoing_end - outgoing_start,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) {
                watch_for_room(true);
                return;   /* the first reader learns when there is room again */
            }
            fail("publishing: %s; the server has said: %.*s", strerror(errno), (int)reply_size, reply);
        }
        outgoing_start += (size_t)n;
    }
    outgoing_start = outgoing_end = 0;
    watch_for_room(false);
}

/* Return how many subscribers are to receive a message. */
static uint32_t audience(uint32_t number)
{
    return audiences[number % (uint32_t)channels];
}

static void publish(void)
{
    uint32_t number = published++;
    size_t total = prefix.size + (size_t)size + suffix.size;
    if (outgoing_end + total > outgoing_room) {
        memmove(outgoing, outgoing + outgoing_start, outgoing_end - outgoing_start);
        outgoing_end -= outgoing_start;
        outgoing_start = 0;
        while (outgoing_end + total > outgoing_room)
            outgoing_room *= 2;
        outgoing = realloc(outgoing, outgoing_room);
    }
    uint8_t *at = outgoing + outgoing_end;
    char digits[16];
    memcpy(at, prefix.bytes, prefix.size);
    fill_in(at, prefix.size, (int)(number % (uint32_t)channels));
    at += prefix.size;
    memset(at, 'x', (size_t)size);
    snprintf(digits, sizeof digits, "%08u", number);
    memcpy(at, digits, DIGITS);
    memcpy(at + size, suffix.bytes, suffix.size);
    outgoing_end += total;
    expected += audience(number);
    arrived[number % WINDOW_MAX] = 0;
    sent_at[number % WINDOW_MAX] = now();
}

/* A message has reached everyone it should. */
static void complete(uint32_t number, uint64_t at)
{
    pthread_mutex_lock(&lock);
    record(&completions, at - sent_at[number % WINDOW_MAX]);
    completed++;
    last_completion = at;
    if (running && published != last_wanted && at < run_until)
        publish();
    else
        running = false;
    if (!running && completed == published)
        pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

static void drain_publisher(void)
{
    char bytes[65536];
    ssize_t n;
    while ((n = recv(publisher, bytes, sizeof bytes, MSG_DONTWAIT)) > 0) {
        size_t kept = sizeof reply - reply_size < (size_t)n ? sizeof reply - reply_size : (size_t)n;
        memcpy(reply + reply_size, bytes, kept);
        reply_size += kept;
    }
    if (n == 0)
        fail("the server has ended the publisher's connection, saying: %.*s", (int)reply_size, reply);
    pthread_mutex_lock(&lock);
    flush_publisher();
    pthread_mutex_unlock(&lock);
}

/* ---- Subscribers ---- */

static void end(Connection *c)
{
    close(c->fd);
    c->state = CLOSED;
    __atomic_add_fetch(&closed, 1, __ATOMIC_RELAXED);
}

static void send_small(Connection *c, const uint8_t *bytes, size_t count)
{
    if (send(c->fd, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)count)
        end(c);
}

static void subscribe(Connection *c)
{
    /* A masking key of zeros: the masked payload is the payload itself. */
    uint8_t frame[8 + 2 + 1024] = {0x81};
    if (!subscription.size)
        return;
    size_t header = subscription.size < 126 ? 6 : 8;
    frame[1] = 0x80 | (uint8_t)(header == 6 ? subscription.size : 126);
    frame[2] = header == 6 ? 0 : (uint8_t)(subscription.size >> 8);
    frame[3] = header == 6 ? 0 : (uint8_t)subscription.size;
    for (int i = 0; i < channels_each && c->state == OPEN; i++) {
        memcpy(frame + header, subscription.bytes, subscription.size);
        fill_in(frame + header, subscription.size, channel_of(c->number, i));
        send_small(c, frame, header + subscription.size);
    }
}

static void opened_now(Reader *r, Connection *c)
{
    c->state = OPEN;
    record(&r->handshakes, now() - c->started);
    subscribe(c);
    if (c->stalled)
        epoll_ctl(r->epoll, EPOLL_CTL_DEL, c->fd, NULL);
    __atomic_add_fetch(&opened, 1, __ATOMIC_RELEASE);
}

/* Walk over the server's answer to the handshake; return how many bytes belong to it. */
static size_t greet(Reader *r, Connection *c, const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (c->held < 12)
            c->header[c->held++] = bytes[i];
        if (*status && c->crlf < 4) {
            c->crlf = bytes[i] == "\r\n\r\n"[c->crlf] ? c->crlf + 1 : bytes[i] == '\r';
            if (c->crlf < 4)
                continue;
            if (memcmp(c->header, "HTTP/1.", 7) || memcmp(c->header + 9, status, 3))
                fail("the handshake was answered: %.*s", (int)count, bytes);
        } else {
            c->rest++;
        }
        if (c->rest == (uint64_t)greeting_bytes) {
            c->held = 0;
            c->rest = 0;
            opened_now(r, c);
            return i + 1;
        }
    }
    return count;
}

/* Return the bytes of a message that may be joined to others, with its line feed. */
static uint64_t joined_size(void)
{
    return (uint64_t)(payload_at + size + joined_tail + 1);
}

/* Return how many bytes at the start of a frame have to be seen at once, as far as `count` of them tell. */
static size_t header_size(const Connection *c, const uint8_t *h, size_t count, uint64_t *payload)
{
    if (fixed_header) {
        *payload = (uint64_t)size + 2;   /* Redis ends a string with CR LF, Mercure with two line feeds */
        return (size_t)fixed_header + DIGITS;
    }
    if (c->joined) {
        *payload = c->joined;
        return (size_t)payload_at + DIGITS;
    }
    if (count < 2)
        return 2;
    size_t header = (h[1] & 0x7f) == 127 ? 10 : (h[1] & 0x7f) == 126 ? 4 : 2;
    if (count < header)
        return header;
    *payload = h[1] & 0x7f;
    if (header > 2) {
        *payload = 0;
        for (size_t i = 2; i < header; i++)
            *payload = *payload << 8 | h[i];
    }
    if ((h[0] & 0x0f) > 2 || *payload < (uint64_t)(payload_at + size + (payload_tail > 0 ? payload_tail : 0)))
        return header;
    if (joined_tail >= 0 && (*payload + 1) % joined_size())
        return header;   /* other answers, joined */
    size_t before = payload_tail < 0 ? (size_t)payload_at : (size_t)*payload - (size_t)(size + payload_tail);
    return header + before + DIGITS <= HEADER_MAX ? header + before + DIGITS : header;
}

static void begin_frame(Connection *c, const uint8_t *h, size_t header, uint64_t payload)
{
    size_t plain = fixed_header ? (size_t)fixed_header : c->joined ? 0 : payload < 126 ? 2 : payload < 65536 ? 4 : 10;
    c->counted = header > plain;
    c->joined = joined_tail >= 0 && c->counted && payload > joined_size() ? payload - joined_size() : 0;
    payload -= c->joined;
    c->rest = payload - (header - plain);
    if (c->counted) {
        uint32_t number = 0;
        for (size_t i = header - DIGITS; i < header; i++)
            number = number * 10 + (uint32_t)(h[i] - '0');
        c->message = number;
    } else if ((h[0] & 0x0f) == 9) {
        send_small(c, (const uint8_t[]){0x8a, 0x80, 0, 0, 0, 0}, 6);
    }
}

static void end_frame(Reader *r, Connection *c, uint64_t at)
{
    if (!c->counted)
        return;
    c->counted = false;
    if (c->message < first)
        return;   /* a probe that another client has missed */
    if (c->message < c->last || c->message >= __atomic_load_n(&published, __ATOMIC_RELAXED)) {
        r->disordered++;
        return;
    }
    c->last = c->message + 1;
    r->received++;
    record(&r->deliveries, at - sent_at[c->message % WINDOW_MAX]);
    if (__atomic_add_fetch(&arrived[c->message % WINDOW_MAX], 1, __ATOMIC_ACQ_REL) == audience(c->message))
        complete(c->message, at);
}

static void walk(Reader *r, Connection *c, const uint8_t *bytes, size_t count, uint64_t at)
{
    while (count) {
        if (c->state != OPEN)
            return;
        if (c->rest) {
            size_t part = c->rest < count ? (size_t)c->rest : count;
            c->rest -= part;
            bytes += part;
            count -= part;
            if (!c->rest)
                end_frame(r, c, at);
            continue;
        }
        uint64_t payload = 0;
        const uint8_t *h = bytes;
        size_t seen = count, needed;
        if (c->held) {
            c->header[c->held++] = *bytes;
            h = c->header;
            seen = c->held;
        }
        needed = header_size(c, h, seen, &payload);
        if (needed <= seen && (needed > 2 || (h[1] & 0x7f) < 126)) {
            size_t consumed = c->held ? 1 : needed;
            c->held = 0;
            bytes += consumed;
            count -= consumed;
            begin_frame(c, h, needed, payload);
            if (!c->rest)
                end_frame(r, c, at);
        } else if (c->held) {
            bytes++;
            count--;
        } else {   /* the header goes on in what comes later; there are fewer bytes than it needs */
            memcpy(c->header, bytes, count);
            c->held = (uint8_t)count;
            return;
        }
    }
}

static void greet_server(Connection *c)
{
    uint8_t bytes[2048];
    memcpy(bytes, request.bytes, request.size);
    fill_in(bytes, request.size, c->number % channels);
    c->state = GREETING;
    send_small(c, bytes, request.size);
}

static void flush_if_needed(void)
{
    if (publisher >= 0 && __atomic_load_n(&outgoing_end, __ATOMIC_RELAXED)) {
        pthread_mutex_lock(&lock);
        flush_publisher();
        pthread_mutex_unlock(&lock);
    }
}

static void receive(Reader *r, Connection *c)
{
    ssize_t n;
    do {
        n = recv(c->fd, r->buffer, READ_BYTES, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n <= 0) {
            end(c);
            return;
        }
        uint64_t at = now();
        r->reads++;
        r->bytes += (uint64_t)n;
        size_t greeting = c->state == GREETING ? greet(r, c, r->buffer, (size_t)n) : 0;
        if (c->stalled && c->state == OPEN)
            return;
        walk(r, c, r->buffer + greeting, (size_t)n - greeting, at);
    } while (n == READ_BYTES && c->state == OPEN);
    if (r->ring.fd >= 0 && c->state == OPEN && !c->stalled) {
        epoll_ctl(r->epoll, EPOLL_CTL_DEL, c->fd, NULL);
        ring_receive(&r->ring, c->fd, c);
    }
    flush_if_needed();
}

/* Begin as many connections as may be under way at once. Return whether the server's queue is full. */
static bool connect_more(Reader *r, int *next)
{
    while (*next < r->count && __atomic_load_n(&begun, __ATOMIC_RELAXED) - __atomic_load_n(&opened, __ATOMIC_RELAXED)
           - __atomic_load_n(&closed, __ATOMIC_RELAXED) < concurrent) {
        Connection *c = &r->connections[*next];
        uint64_t started = c->started ? c->started : now();
        c->started = started;
        c->fd = socket(server_address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (c->fd < 0)
            fail("socket: %s; raise the limit of open files", strerror(errno));
        if (!connect(c->fd, (struct sockaddr *)&server_address, server_length)) {
            __atomic_add_fetch(&begun, 1, __ATOMIC_RELAXED);
            (*next)++;
            greet_server(c);
            watch(r->epoll, c->fd, c, EPOLLIN | EPOLLET);
        } else if (errno == EINPROGRESS) {
            __atomic_add_fetch(&begun, 1, __ATOMIC_RELAXED);
            (*next)++;
            c->state = CONNECTING;
            watch(r->epoll, c->fd, c, EPOLLIN | EPOLLOUT | EPOLLET);
        } else if (errno == EAGAIN) {
            close(c->fd);
            return true;
        } else {
            fail("connect: %s", strerror(errno));
        }
    }
    return *next < r->count;
}

/* Take in what has arrived through the ring, waiting for it, though only for a moment if `briefly`. Return whether there
 * is something for epoll as well. */
static bool receive_by_ring(Reader *r, bool briefly)
{
    Completion completion;
    bool others = briefly;
    if (!ring_wait(&r->ring, briefly))
        fail("io_uring_enter: %s", strerror(errno));
    while (ring_next(&r->ring, &completion)) {
        Connection *c = completion.owner;
        if (!c) {
            others = true;
            ring_watch(&r->ring, r->epoll, NULL);
            continue;
        }
        if (completion.bytes) {
            r->reads++;
            r->bytes += (uint64_t)completion.result;
            walk(r, c, completion.bytes, (size_t)completion.result, now());
            ring_give_back(&r->ring, completion.bytes);
            flush_if_needed();
        }
        if (completion.more)
            continue;
        if (completion.result > 0 || completion.result == -ENOBUFS)
            ring_receive(&r->ring, c->fd, c);
        else
            end(c);
    }
    return others;
}

static void *read_for_ever(void *argument)
{
    Reader *r = argument;
    struct epoll_event events[EVENTS];
    int next = 0;
    if (ring_open(&r->ring))
        ring_watch(&r->ring, r->epoll, NULL);
    while (true) {
        bool waiting = connect_more(r, &next);
        if (r->ring.fd >= 0 && !receive_by_ring(r, waiting))
            continue;
        int n = epoll_wait(r->epoll, events, EVENTS, r->ring.fd >= 0 ? 0 : waiting ? 1 : -1);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (!c)
                drain_publisher();
            else if (c->state == CONNECTING)
                greet_server(c);
            else if (c->state != CLOSED)
                receive(r, c);
        }
    }
    return NULL;
}

/* ---- A client that only pings, in a thread of its own: is the server still there for others? ---- */

static void *ping_for_ever(void *argument)
{
    uint8_t bytes[4096];
    (void)argument;
    int fd = socket(server_address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memcpy(bytes, request.bytes, request.size);
    fill_in(bytes, request.size, 99999999);   /* a channel that nothing is published on */
    if (connect(fd, (struct sockaddr *)&server_address, server_length)
        || send(fd, bytes, request.size, MSG_NOSIGNAL) < 0 || recv(fd, bytes, sizeof bytes, 0) <= 0)
        fail("the pinging client cannot connect: %s", strerror(errno));
    while (true) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        poll(NULL, 0, PING_INTERVAL_MS);
        while (poll(&ready, 1, 0) > 0)   /* what else the server had to say */
            if (recv(fd, bytes, sizeof bytes, 0) <= 0)
                return NULL;
        if (!__atomic_load_n(&running, __ATOMIC_RELAXED))
            continue;   /* while others have their turn: servers limit how much a client may say in the long run */
        uint64_t sent = now();
        if (send(fd, (const uint8_t[]){0x89, 0x81, 0, 0, 0, 0, 'p'}, 7, MSG_NOSIGNAL) < 0
            || recv(fd, bytes, sizeof bytes, 0) <= 0)
            return NULL;
        pthread_mutex_lock(&lock);
        record(&pongs, now() - sent);
        pthread_mutex_unlock(&lock);
    }
}

/* ---- Commands ---- */

static bool wait_until_complete(uint64_t seconds)
{
    uint32_t before = completed;
    uint64_t deadline = now() + seconds * 1000000000u;
    bool in_time = true;
    while (running || completed != published) {
        struct timespec until = {.tv_sec = (time_t)(deadline / 1000000000u), .tv_nsec = (long)(deadline % 1000000000u)};
        if (pthread_cond_timedwait(&changed, &lock, &until) == ETIMEDOUT) {
            if (completed == before) {
                in_time = false;
                break;
            }
            before = completed;
            deadline = now() + seconds * 1000000000u;
        }
    }
    running = false;
    return in_time;
}

static void begin(int window, double seconds, uint32_t messages)
{
    first = completed = published;
    expected = 0;
    last_wanted = published + messages;
    run_until = now() + (uint64_t)(seconds * 1e9);
    running = true;
    for (int i = 0; i < window && published != last_wanted; i++)
        publish();
    flush_publisher();
}

/* Publish until a message reaches everybody: all are subscribed then. */
static void probe(void)
{
    uint64_t deadline = now() + CONNECT_SECONDS * 1000000000ull;
    pthread_mutex_lock(&lock);
    do {
        if (now() > deadline)
            fail("%u of %u deliveries of a probe; closed connections: %d; the publisher was answered: %.*s",
                 arrived[(published - 1) % WINDOW_MAX], audience(published - 1), closed, (int)reply_size, reply);
        begin(channels < WINDOW_MAX ? channels : WINDOW_MAX, 0, (uint32_t)channels);
    } while (!wait_until_complete(PROBE_SECONDS));
    pthread_mutex_unlock(&lock);
}

static void run(int window, double seconds, uint32_t messages)
{
    static Histogram all;   /* of deliveries; too large for a stack */
    struct rusage before, after;
    double thread_before[threads], busiest = 0;
    uint64_t received = 0, bytes = 0, reads = 0, disordered = 0;
    clockid_t clock;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < threads; i++) {
        Reader *r = &readers[i];
        memset(&r->deliveries, 0, sizeof r->deliveries);
        r->received = r->bytes = r->reads = r->disordered = 0;
        thread_before[i] = pthread_getcpuclockid(r->thread, &clock) ? 0 : seconds_of(clock);
    }
    memset(&completions, 0, sizeof completions);
    memset(&pongs, 0, sizeof pongs);
    memset(&all, 0, sizeof all);
    getrusage(RUSAGE_SELF, &before);
    uint64_t started = now();
    last_completion = started;
    begin(window, seconds, messages);
    bool whole = wait_until_complete(STALL_SECONDS);
    double elapsed = (double)(last_completion - started) / 1e9;
    getrusage(RUSAGE_SELF, &after);
    for (int i = 0; i < threads; i++) {
        Reader *r = &readers[i];
        double used = (pthread_getcpuclockid(r->thread, &clock) ? 0 : seconds_of(clock)) - thread_before[i];
        busiest = used > busiest ? used : busiest;
        merge(&all, &r->deliveries);
        received += r->received;
        bytes += r->bytes;
        reads += r->reads;
        disordered += r->disordered;
    }
#define CPU(field) ((double)(after.field.tv_sec - before.field.tv_sec) \
                    + (double)(after.field.tv_usec - before.field.tv_usec) / 1e6)
    printf("{\"event\": \"run\", \"whole\": %s, \"messages\": %u, \"expected\": %llu, \"deliveries\": %llu, "
           "\"disordered\": %llu, \"closed\": %d, \"seconds\": %.6f, \"rate\": %.1f, \"bytes\": %llu, \"reads\": %llu, "
           "\"client_cpu\": %.4f, \"busiest_thread\": %.4f",
           whole && !disordered ? "true" : "false", published - first,
           (unsigned long long)expected, (unsigned long long)received,
           (unsigned long long)disordered, closed, elapsed, elapsed > 0 ? (double)received / elapsed : 0,
           (unsigned long long)bytes, (unsigned long long)reads, CPU(ru_utime) + CPU(ru_stime), busiest);
    print_histogram("broadcast_ms", &completions);
    print_histogram("delivery_ms", &all);
    if (pings)
        print_histogram("ping_ms", &pongs);
    printf("}\n");
    fflush(stdout);
    pthread_mutex_unlock(&lock);
}

/* ---- Start ---- */

static Template from_hex(const char *text)
{
    Template t = {malloc(strlen(text) / 2 + 1), strlen(text) / 2};
    for (size_t i = 0; i < t.size; i++)
        sscanf(text + 2 * i, "%2hhx", &t.bytes[i]);
    return t;
}

/* "unix:PATH" or "tcp:PORT", the latter on the loopback interface. */
static socklen_t parse_address(const char *text, struct sockaddr_storage *address)
{
    memset(address, 0, sizeof *address);
    if (!strncmp(text, "unix:", 5)) {
        struct sockaddr_un *un = (struct sockaddr_un *)address;
        un->sun_family = AF_UNIX;
        strncpy(un->sun_path, text + 5, sizeof un->sun_path - 1);
        return sizeof *un;
    }
    struct sockaddr_in *in = (struct sockaddr_in *)address;
    in->sin_family = AF_INET;
    in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    in->sin_port = htons((uint16_t)atoi(text + 4));
    return sizeof *in;
}

static void parse_command_line(int count, char **arguments)
{
    static const struct option options[] = {
        {"server", 1, 0, 's'}, {"publish", 1, 0, 'p'}, {"clients", 1, 0, 'n'}, {"stalled", 1, 0, 'x'},
        {"threads", 1, 0, 't'}, {"channels", 1, 0, 'm'}, {"channels-each", 1, 0, 'e'}, {"concurrent", 1, 0, 'c'},
        {"size", 1, 0, 'z'}, {"payload-at", 1, 0, 'a'}, {"fixed-header", 1, 0, 'f'}, {"greeting-bytes", 1, 0, 'g'},
        {"payload-tail", 1, 0, 'l'}, {"joined-tail", 1, 0, 'j'}, {"status", 1, 0, 'h'}, {"ping", 0, 0, 'i'},
        {"request", 1, 0, 'r'}, {"subscription", 1, 0, 'u'}, {"prefix", 1, 0, 'b'}, {"suffix", 1, 0, 'd'}, {0, 0, 0, 0}};
    int option;
    while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
        switch (option) {
        case 's': server_length = parse_address(optarg, &server_address); break;
        case 'p': publish_length = parse_address(optarg, &publish_address); publishes = true; break;
        case 'n': clients = atoi(optarg); break;
        case 'x': stalled = atoi(optarg); break;
        case 't': threads = atoi(optarg); break;
        case 'm': channels = atoi(optarg); break;
        case 'e': channels_each = atoi(optarg); break;
        case 'c': concurrent = atoi(optarg); break;
        case 'z': size = atoi(optarg); break;
        case 'a': payload_at = atoi(optarg); break;
        case 'l': payload_tail = atoi(optarg); break;
        case 'j': joined_tail = atoi(optarg); break;
        case 'h': status = optarg; break;
        case 'f': fixed_header = atoi(optarg); break;
        case 'g': greeting_bytes = atoi(optarg); break;
        case 'i': pings = true; break;
        case 'r': request = from_hex(optarg); break;
        case 'u': subscription = from_hex(optarg); break;
        case 'b': prefix = from_hex(optarg); break;
        case 'd': suffix = from_hex(optarg); break;
        default: exit(2);
        }
    }
    if (!server_length || !request.size || request.size > 2000 || subscription.size > 1000 || size < DIGITS
        || payload_at + 14 + DIGITS > HEADER_MAX || fixed_header + DIGITS > HEADER_MAX)
        fail("bad arguments");
    if (!suffix.bytes)
        suffix = from_hex("");
    if (channels < 1 || channels_each < 1 || channels_each > channels)
        fail("bad arguments");
    audiences = calloc((size_t)channels, sizeof *audiences);
    for (int i = 0; i < clients - stalled; i++)
        for (int j = 0; j < channels_each; j++)
            audiences[channel_of(i, j)]++;
    for (int i = 0; i < channels && publishes; i++)
        if (!audiences[i])
            fail("nobody reads channel %d, so that its messages would never arrive", i);
}

int main(int count, char **arguments)
{
    struct rlimit files;
    pthread_condattr_t attributes;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    parse_command_line(count, arguments);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &attributes);
    outgoing = malloc(outgoing_room = 1 << 20);

    readers = calloc((size_t)threads, sizeof *readers);
    for (int i = 0; i < threads; i++) {
        readers[i].epoll = epoll_create1(EPOLL_CLOEXEC);
        readers[i].buffer = malloc(READ_BYTES);
        readers[i].connections = calloc((size_t)clients, sizeof(Connection));
    }
    for (int i = 0; i < clients; i++) {
        Reader *r = &readers[i % threads];
        r->connections[r->count++] = (Connection){.fd = -1, .number = i, .stalled = i >= clients - stalled};
    }
    if (publishes) {
        publisher = socket(publish_address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(publisher, (struct sockaddr *)&publish_address, publish_length))
            fail("the publisher cannot connect: %s", strerror(errno));
        if (publish_address.ss_family == AF_INET)
            setsockopt(publisher, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
        watch(readers[0].epoll, publisher, NULL, EPOLLIN | EPOLLET);
    }
    uint64_t started = now();
    for (int i = 0; i < threads; i++)
        pthread_create(&readers[i].thread, NULL, read_for_ever, &readers[i]);
    while (__atomic_load_n(&opened, __ATOMIC_ACQUIRE) < clients) {
        if (now() - started > CONNECT_SECONDS * 1000000000ull)
            fail("%d of %d clients connected after %d s; %d were closed", opened, clients, CONNECT_SECONDS, closed);
        poll(NULL, 0, 1);
    }
    double connecting = (double)(now() - started) / 1e9;
    if (publishes)
        probe();
    if (pings) {
        pthread_t thread;
        pthread_create(&thread, NULL, ping_for_ever, NULL);
    }
    static Histogram handshakes;
    for (int i = 0; i < threads; i++)
        merge(&handshakes, &readers[i].handshakes);
    printf("{\"event\": \"ready\", \"seconds\": %.6f, \"closed\": %d", connecting, closed);
    print_histogram("handshake_ms", &handshakes);
    printf("}\n");
    fflush(stdout);

    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        int window;
        double seconds;
        unsigned messages;
        if (sscanf(line, "run %d %lf %u", &window, &seconds, &messages) != 3 || window > WINDOW_MAX)
            fail("bad command: %s", line);
        run(window, seconds, messages);
    }
    _exit(0);
}
