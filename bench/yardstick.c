/*
 * The yardstick: what a C programmer would write in an afternoon.
 *
 * Reads lines on standard input, escapes each into a JSON record and pushes it with
 * one zmq_send per line, with libzmq's default options. Every speed in
 * docs/performance.md is a ratio to this program in the same run.
 *
 * Usage: yardstick ENDPOINT [TYPE]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

enum { INPUT_BYTES = 1 << 20, READ_BYTES = 1 << 16 };

static char input[INPUT_BYTES];
static char record[6 * INPUT_BYTES + 512];
static unsigned char special[256];

static void die(const char *what)
{
    fprintf(stderr, "yardstick: %s: %s\n", what, zmq_strerror(zmq_errno()));
    exit(1);
}

static char *escape(char *out, const char *in, const char *end)
{
    while (in < end) {
        const char *run = in;
        while (in < end && !special[(unsigned char)*in])
            in++;
        memcpy(out, run, (size_t)(in - run));
        out += in - run;
        if (in == end)
            break;
        unsigned char c = (unsigned char)*in++;
        if (c == '"' || c == '\\') {
            *out++ = '\\';
            *out++ = (char)c;
        } else {
            out += sprintf(out, "\\u%04x", c);
        }
    }
    return out;
}

static void push(void *socket, const char *line, const char *end, const char *tail, size_t tail_bytes)
{
    static const char head[] = "{\"message\":\"";
    char *out = record;

    if (end > line && end[-1] == '\r')
        end--;
    memcpy(out, head, sizeof head - 1);
    out = escape(out + sizeof head - 1, line, end);
    memcpy(out, tail, tail_bytes);
    out += tail_bytes;
    if (zmq_send(socket, record, (size_t)(out - record), 0) < 0)
        die("zmq_send");
}

int main(int argc, char **argv)
{
    char tail[256];
    size_t tail_bytes, held = 0;
    ssize_t got;
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_PUSH);

    if (argc < 2) {
        fprintf(stderr, "usage: yardstick ENDPOINT [TYPE]\n");
        return 2;
    }
    for (int c = 0; c < 0x20; c++)
        special[c] = 1;
    special['"'] = special['\\'] = 1;
    tail_bytes = (size_t)snprintf(tail, sizeof tail, "\",\"type\":\"%s\",\"@pid\":%d}", argc > 2 ? argv[2] : "syslog",
                                  (int)getpid());
    if (zmq_connect(socket, argv[1]) < 0)
        die(argv[1]);

    while ((got = read(0, input + held, held + READ_BYTES > INPUT_BYTES ? INPUT_BYTES - held : READ_BYTES)) > 0) {
        char *line = input, *newline, *end = input + held + got;
        while ((newline = memchr(line, '\n', (size_t)(end - line)))) {
            push(socket, line, newline, tail, tail_bytes);
            line = newline + 1;
        }
        held = (size_t)(end - line);
        if (held == INPUT_BYTES) {
            fprintf(stderr, "yardstick: line over %d bytes\n", INPUT_BYTES);
            return 1;
        }
        memmove(input, line, held);
    }
    if (held)
        push(socket, input, input + held, tail, tail_bytes);
    zmq_close(socket);
    zmq_ctx_term(context);
    return 0;
}
