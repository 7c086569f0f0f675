/*
 * The receiver of the benchmark: a bare PULL socket that counts and is not the bottleneck.
 *
 * Binds ENDPOINT, prints "ready", waits for RECORDS records, prints one line
 *     RECORDS SECONDS BYTES MESSAGES
 * (seconds from the first record to the last) and exits. A record is a frame, or,
 * with MARK, each place in a frame where MARK stands.
 *
 * Usage: receiver ENDPOINT RECORDS [MARK]
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <zmq.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static long count(const char *data, size_t size, const char *mark)
{
    size_t mark_bytes = strlen(mark);
    const char *end = data + size, *at = data;
    long n = 0;

    if (mark_bytes == 1) {
        while ((at = memchr(at, *mark, (size_t)(end - at)))) {
            n++;
            at++;
        }
    } else {
        while ((at = memmem(at, (size_t)(end - at), mark, mark_bytes))) {
            n++;
            at += mark_bytes;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_PULL);
    int hwm = 100000;
    long records = 0, wanted, messages = 0;
    long long bytes = 0;
    double started = 0;
    zmq_msg_t message;

    if (argc < 3) {
        fprintf(stderr, "usage: receiver ENDPOINT RECORDS [MARK]\n");
        return 2;
    }
    wanted = atol(argv[2]);
    zmq_setsockopt(socket, ZMQ_RCVHWM, &hwm, sizeof hwm);
    if (zmq_bind(socket, argv[1]) < 0) {
        fprintf(stderr, "receiver: %s: %s\n", argv[1], zmq_strerror(zmq_errno()));
        return 1;
    }
    puts("ready");
    fflush(stdout);
    zmq_msg_init(&message);
    while (records < wanted) {
        if (zmq_msg_recv(&message, socket, 0) < 0)
            return 1;
        if (!messages)
            started = now();
        records += argc > 3 ? count(zmq_msg_data(&message), zmq_msg_size(&message), argv[3]) : 1;
        bytes += (long long)zmq_msg_size(&message);
        messages += !zmq_msg_more(&message);
    }
    printf("%ld %.6f %lld %ld\n", records, now() - started, bytes, messages);
    zmq_msg_close(&message);
    zmq_close(socket);
    zmq_ctx_term(context);
    return 0;
}
