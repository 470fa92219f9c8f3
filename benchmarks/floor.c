/* The floor: the same bytes to the same number of Unix sockets, with send(2) in a loop and nothing else.
 *
 * Strategy. A server that knows one channel and does only what no server can leave out: it accepts connections, answers
 * every request with one fixed 101, and sends the bytes from its control socket to all clients. Messages that arrive
 * together are sent together, as good servers do. It parses no request, keeps no queue, and waits in send(2) for a client
 * that does not read. On the control socket a message is a big-endian length (4 bytes), a channel (8 bytes, ignored) and
 * the message itself; the length counts the bytes after it.
 *
 * Usage: floor WEBSOCKET-PATH CONTROL-PATH */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CLIENTS_MAX 65536
#define CONTROL_BYTES (4 << 20)

static const char answer[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";   /* for the key that the load client sends */

static int subscribers[CLIENTS_MAX], count;
static uint8_t control[CONTROL_BYTES], frames[CONTROL_BYTES + (CONTROL_BYTES >> 2)];
static size_t held;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096))
        die(path);
    return fd;
}

static void watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        die("epoll_ctl");
}

static size_t append_frame(uint8_t *at, const uint8_t *payload, size_t size)
{
    size_t header = size < 126 ? 2 : size < 65536 ? 4 : 10;
    at[0] = 0x81;
    at[1] = (uint8_t)(header == 2 ? size : header == 4 ? 126 : 127);
    for (size_t i = 2; i < header; i++)
        at[i] = (uint8_t)((uint64_t)size >> 8 * (header - 1 - i));
    memcpy(at + header, payload, size);
    return header + size;
}

/* Send all whole messages that have arrived to everyone. Return whether the publisher is still there. */
static int fan_out(int publisher)
{
    ssize_t n = recv(publisher, control + held, sizeof control - held, 0);
    size_t at = 0, total = 0;
    if (n <= 0)
        return 0;
    held += (size_t)n;
    while (held - at >= 4) {
        size_t length = (size_t)control[at] << 24 | (size_t)control[at + 1] << 16 | (size_t)control[at + 2] << 8
            | control[at + 3];
        if (held - at < 4 + length)
            break;
        total += append_frame(frames + total, control + at + 12, length - 8);
        at += 4 + length;
    }
    for (int i = 0; i < count && total; i++)
        for (size_t sent = 0; sent < total;) {
            ssize_t part = send(subscribers[i], frames + sent, total - sent, MSG_NOSIGNAL);
            if (part < 0)
                break;   /* gone; its end is noticed elsewhere */
            sent += (size_t)part;
        }
    held -= at;
    memmove(control, control + at, held);
    return 1;
}

static void drop(int fd)
{
    close(fd);
    for (int i = 0; i < count; i++)
        if (subscribers[i] == fd) {
            subscribers[i] = subscribers[--count];
            return;
        }
}

int main(int arguments, char **argument)
{
    struct rlimit files;
    struct epoll_event events[256];
    static char ignored[65536];
    int publisher = -1;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (arguments != 3)
        return 2;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    int websocket = listen_at(argument[1]), control_socket = listen_at(argument[2]);
    watch(epoll, websocket);
    watch(epoll, control_socket);
    while (1) {
        int n = epoll_wait(epoll, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == control_socket) {
                publisher = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
                watch(epoll, publisher);
            } else if (fd == websocket) {
                int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);   /* blocking: send waits for who does not read */
                if (client >= 0)
                    watch(epoll, client);
            } else if (fd == publisher) {
                if (!fan_out(fd)) {
                    close(fd);
                    publisher = -1;
                    held = 0;
                }
            } else if (recv(fd, ignored, sizeof ignored, MSG_DONTWAIT) <= 0) {
                drop(fd);
            } else if (memcmp(ignored, "GET ", 4) == 0 && count < CLIENTS_MAX) {
                subscribers[count++] = fd;
                if (send(fd, answer, sizeof answer - 1, MSG_NOSIGNAL) < 0)
                    drop(fd);
            }
        }
    }
}
