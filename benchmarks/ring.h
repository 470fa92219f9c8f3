/* Receiving from thousands of sockets through io_uring, as far as the load client needs it.
 *
 * Each socket gets one receive that repeats itself ("multishot"); the kernel puts arriving bytes into buffers of a common
 * pool. Compared with epoll and recv, two walks through the kernel for each message become a share of one. The client
 * takes a third less time, which leaves more of the machine to the server that a run measures.
 *
 * Source: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), linux/io_uring.h. Linux 6.1 has all of it; where it
 * is missing or forbidden, ring_open reports that, and the caller uses epoll. */

#ifndef RING_H
#define RING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RING_SUBMISSIONS 4096
#define RING_COMPLETIONS 32768
#define RING_BUFFERS 128          /* few, so that they stay in the processor's caches; a power of two */
#define RING_BUFFER_BYTES 16384

typedef struct {
    int fd;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    uint32_t *submitted_tail, *completed_head, *completed_tail;
    uint32_t submissions, completions;   /* entries, powers of two */
    uint32_t to_submit;
    struct io_uring_buf_ring *pool;
    uint8_t *bytes;
    uint16_t pool_tail;
} Ring;

typedef struct {
    void *owner;                  /* what was given when this was asked for */
    int result;                   /* bytes received, or a negative error number */
    bool more;                    /* it goes on; else it must be requested again */
    uint8_t *bytes;               /* what was received, until `ring_give_back`; NULL if nothing was */
} Completion;

#ifdef IORING_SETUP_DEFER_TASKRUN

static void ring_give_back(Ring *ring, uint8_t *bytes)
{
    uint16_t id = (uint16_t)((bytes - ring->bytes) / RING_BUFFER_BYTES);
    ring->pool->bufs[ring->pool_tail & (RING_BUFFERS - 1)].addr = (uint64_t)(uintptr_t)bytes;
    ring->pool->bufs[ring->pool_tail & (RING_BUFFERS - 1)].len = RING_BUFFER_BYTES;
    ring->pool->bufs[ring->pool_tail & (RING_BUFFERS - 1)].bid = id;
    __atomic_store_n(&ring->pool->tail, ++ring->pool_tail, __ATOMIC_RELEASE);
}

static void *ring_memory(size_t size, int fd, off_t offset)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_POPULATE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED), fd, offset);
    return memory == MAP_FAILED ? NULL : memory;
}

/* Open a ring for the thread that calls this, and no other. Return false where the kernel has or allows none. */
static bool ring_open(Ring *ring)
{
    struct io_uring_params p = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CQSIZE,
        .cq_entries = RING_COMPLETIONS};
    memset(ring, 0, sizeof *ring);
    ring->fd = (int)syscall(SYS_io_uring_setup, RING_SUBMISSIONS, &p);
    if (ring->fd < 0)
        return false;
    size_t completions = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    size_t indices = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    uint8_t *shared = ring_memory(completions > indices ? completions : indices, ring->fd, IORING_OFF_SQ_RING);
    ring->sqes = ring_memory(p.sq_entries * sizeof(struct io_uring_sqe), ring->fd, IORING_OFF_SQES);
    ring->pool = ring_memory(RING_BUFFERS * sizeof(struct io_uring_buf), -1, 0);
    ring->bytes = ring_memory((size_t)RING_BUFFERS * RING_BUFFER_BYTES, -1, 0);
    struct io_uring_buf_reg pool = {.ring_addr = (uint64_t)(uintptr_t)ring->pool, .ring_entries = RING_BUFFERS};
    if (!shared || !ring->sqes || !ring->pool || !ring->bytes
        || syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_PBUF_RING, &pool, 1)) {
        close(ring->fd);
        ring->fd = -1;
        return false;
    }
    for (uint32_t i = 0; i < p.sq_entries; i++)
        ((uint32_t *)(shared + p.sq_off.array))[i] = i;
    ring->submitted_tail = (uint32_t *)(shared + p.sq_off.tail);
    ring->completed_head = (uint32_t *)(shared + p.cq_off.head);
    ring->completed_tail = (uint32_t *)(shared + p.cq_off.tail);
    ring->cqes = (struct io_uring_cqe *)(shared + p.cq_off.cqes);
    ring->submissions = p.sq_entries;
    ring->completions = p.cq_entries;
    for (int i = 0; i < RING_BUFFERS; i++)
        ring_give_back(ring, ring->bytes + (size_t)i * RING_BUFFER_BYTES);
    return true;
}

/* Submit what was asked for, and wait until something is complete, or only for a millisecond if `briefly`. Return false
 * on an error, which errno says. */
static bool ring_wait(Ring *ring, bool briefly)
{
    struct __kernel_timespec millisecond = {.tv_nsec = 1000000};
    struct io_uring_getevents_arg limit = {.ts = (uint64_t)(uintptr_t)&millisecond};
    if (!ring->to_submit && *ring->completed_head != __atomic_load_n(ring->completed_tail, __ATOMIC_ACQUIRE))
        return true;
    long done = syscall(SYS_io_uring_enter, ring->fd, ring->to_submit, 1,
                        IORING_ENTER_GETEVENTS | (briefly ? IORING_ENTER_EXT_ARG : 0), briefly ? &limit : NULL,
                        briefly ? sizeof limit : 0);
    if (done < 0 && errno != ETIME && errno != EINTR)
        return false;
    if (done > 0)
        ring->to_submit -= (uint32_t)done;
    return true;
}

static struct io_uring_sqe *ring_ask(Ring *ring, uint8_t operation, int fd, void *owner)
{
    while (ring->to_submit == ring->submissions) {
        long done = syscall(SYS_io_uring_enter, ring->fd, ring->to_submit, 0, 0, NULL, 0);
        if (done > 0)
            ring->to_submit -= (uint32_t)done;
    }
    uint32_t tail = *ring->submitted_tail;
    struct io_uring_sqe *sqe = &ring->sqes[tail & (ring->submissions - 1)];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = operation;
    sqe->fd = fd;
    sqe->user_data = (uint64_t)(uintptr_t)owner;
    __atomic_store_n(ring->submitted_tail, tail + 1, __ATOMIC_RELEASE);
    ring->to_submit++;
    return sqe;
}

/* Receive from a socket until it ends. */
static void ring_receive(Ring *ring, int fd, void *owner)
{
    struct io_uring_sqe *sqe = ring_ask(ring, IORING_OP_RECV, fd, owner);
    sqe->ioprio = IORING_RECV_MULTISHOT;
    sqe->flags = IOSQE_BUFFER_SELECT;
}

/* Say once when a descriptor can be read from. */
static void ring_watch(Ring *ring, int fd, void *owner)
{
    ring_ask(ring, IORING_OP_POLL_ADD, fd, owner)->poll32_events = 1;   /* POLLIN; both of its halves are the same */
}

/* Take the next completion, if there is one. */
static bool ring_next(Ring *ring, Completion *completion)
{
    uint32_t head = *ring->completed_head;
    if (head == __atomic_load_n(ring->completed_tail, __ATOMIC_ACQUIRE))
        return false;
    const struct io_uring_cqe *cqe = &ring->cqes[head & (ring->completions - 1)];
    completion->owner = (void *)(uintptr_t)cqe->user_data;
    completion->result = cqe->res;
    completion->more = cqe->flags & IORING_CQE_F_MORE;
    completion->bytes = cqe->flags & IORING_CQE_F_BUFFER
        ? ring->bytes + (size_t)(cqe->flags >> IORING_CQE_BUFFER_SHIFT) * RING_BUFFER_BYTES : NULL;
    __atomic_store_n(ring->completed_head, head + 1, __ATOMIC_RELEASE);
    return true;
}

#else   /* headers of an older kernel */

static bool ring_open(Ring *ring) { ring->fd = -1; return false; }
static bool ring_wait(Ring *ring, bool briefly) { (void)ring; (void)briefly; return false; }
static bool ring_next(Ring *ring, Completion *completion) { (void)ring; (void)completion; return false; }
static void ring_receive(Ring *ring, int fd, void *owner) { (void)ring; (void)fd; (void)owner; }
static void ring_watch(Ring *ring, int fd, void *owner) { (void)ring; (void)fd; (void)owner; }
static void ring_give_back(Ring *ring, uint8_t *bytes) { (void)ring; (void)bytes; }

#endif
#endif
