/* The load generator's command-line parser. Every option but the port has a default. */
#ifndef BENCH_OPTIONS_H
#define BENCH_OPTIONS_H

#include <arpa/inet.h>
#include <getopt.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options {
    struct sockaddr_in address;
    bool framed;    /* rpc: every payload has a header; echo: it has none */
    bool reconnect; /* a connection that has made its requests is replaced by a new one */
    bool resume;    /* which resumes its session */
    uint32_t connections, outstanding;
    uint64_t requests; /* per connection; 0 = no limit */
    uint64_t counted;  /* over all connections, in the warm-up and in a measurement; 0 = by time */
    size_t size;       /* of the payload, without a header */
    double rate;       /* requests a second over all connections; 0 = closed loop */
    double seconds, warmup, idle, stall;
};

static const char USAGE[] =
    "usage: load --port P [--host 127.0.0.1] [--workload rpc|echo] [--connections 1]\n"
    "            [--size 64] [--outstanding 1] [--seconds 1.5] [--warmup 0.3]\n"
    "            [--requests N] [--reconnect [--resume]] [--rate R] [--idle S] [--counted N]\n"
    "            [--stall 10]\n"
    "\n"
    "  --size         bytes of payload; rpc puts a header of 4 bytes before them\n"
    "  --outstanding  requests that every connection keeps in flight\n"
    "  --requests     per connection; the run ends when all are made, or when the time is up\n"
    "  --reconnect    after its requests a connection is closed and a new one takes its place\n"
    "  --resume       which resumes the TLS session of the one before; load_tls only\n"
    "  --rate         requests a second, begun at fixed times and by each connection in turn,\n"
    "                 whatever the server does; it has failed when `outstanding` are unanswered\n"
    "  --idle         afterwards stay connected and silent for so long; the result is printed "
    "first\n"
    "  --counted      the warm-up and the measurement each end after so many requests over all\n"
    "                 connections, not by time; for each line of standard input it measures once\n"
    "  --stall        seconds without any progress after which the run has failed\n"
    "\n"
    "Prints MEASURING when the warm-up is over, and at the end one line of JSON. Exit status: 0, 1\n"
    "when an answer was wrong or missing, 2 for misuse.\n";

__attribute__((format(printf, 1, 2), noreturn)) static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static uint64_t parse_count(const char *name, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (end == text || *end != '\0' || *text == '-' || value < least || value > most)
        die("--%s must be a number from %llu to %llu, not '%s'", name, (unsigned long long)least,
            (unsigned long long)most, text);
    return value;
}

static double parse_seconds(const char *name, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= 0 && value <= 1e6))
        die("--%s must be a number of seconds, not '%s'", name, text);
    return value;
}

static double parse_rate(const char *name, const char *text)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= 1 && value <= 1e6))
        die("--%s must be a number from 1 to 1000000, not '%s'", name, text);
    return value;
}

static bool parse_workload(const char *text)
{
    if (strcmp(text, "rpc") != 0 && strcmp(text, "echo") != 0)
        die("--workload must be rpc or echo, not '%s'", text);
    return strcmp(text, "rpc") == 0;
}

static void parse_option(struct options *opt, int letter, const char *name, const char *text)
{
    switch (letter) {
    case 'h':
        if (inet_pton(AF_INET, text, &opt->address.sin_addr) != 1)
            die("--host must be an IPv4 address, not '%s'", text);
        break;
    case 'p': opt->address.sin_port = htons((uint16_t)parse_count(name, text, 1, 65535)); break;
    case 'w': opt->framed = parse_workload(text); break;
    case 'c': opt->connections = (uint32_t)parse_count(name, text, 1, 1000000); break;
    case 's': opt->size = (size_t)parse_count(name, text, 1, 1 << 26); break;
    case 'k': opt->outstanding = (uint32_t)parse_count(name, text, 1, 1 << 16); break;
    case 't': opt->seconds = parse_seconds(name, text); break;
    case 'u': opt->warmup = parse_seconds(name, text); break;
    case 'n': opt->requests = parse_count(name, text, 1, UINT32_MAX); break;
    case 'r': opt->reconnect = true; break;
    case 'R': opt->resume = true; break;
    case 'a': opt->rate = parse_rate(name, text); break;
    case 'C': opt->counted = parse_count(name, text, 1, UINT32_MAX); break;
    case 'i': opt->idle = parse_seconds(name, text); break;
    case 'l': opt->stall = parse_seconds(name, text); break;
    default: fputs(USAGE, letter == 'H' ? stdout : stderr); exit(letter == 'H' ? 0 : 2);
    }
}

static struct options parse_options(int argc, char **argv)
{
    static const struct option names[] = {
        {"host", 1, NULL, 'h'},        {"port", 1, NULL, 'p'},    {"workload", 1, NULL, 'w'},
        {"connections", 1, NULL, 'c'}, {"size", 1, NULL, 's'},    {"outstanding", 1, NULL, 'k'},
        {"seconds", 1, NULL, 't'},     {"warmup", 1, NULL, 'u'},  {"requests", 1, NULL, 'n'},
        {"reconnect", 0, NULL, 'r'},   {"idle", 1, NULL, 'i'},    {"stall", 1, NULL, 'l'},
        {"rate", 1, NULL, 'a'},        {"counted", 1, NULL, 'C'}, {"resume", 0, NULL, 'R'},
        {"help", 0, NULL, 'H'},        {NULL, 0, NULL, 0},
    };
    struct options opt = {
        .address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)},
        .framed = true,
        .connections = 1,
        .outstanding = 1,
        .size = 64,
        .seconds = 1.5,
        .warmup = 0.3,
        .stall = 10,
    };
    int letter, index = 0;
    while ((letter = getopt_long(argc, argv, "", names, &index)) != -1)
        parse_option(&opt, letter, letter == '?' ? "" : names[index].name, optarg);
    if (optind < argc)
        die("unexpected argument '%s'", argv[optind]);
    if (opt.address.sin_port == 0)
        die("--port is needed");
    if (opt.reconnect && opt.requests == 0)
        die("--reconnect needs --requests");
    if (opt.resume && !opt.reconnect)
        die("--resume needs --reconnect");
    if (opt.rate > 0 && (opt.requests != 0 || opt.idle > 0))
        die("--rate takes neither --requests nor --idle");
    if (opt.counted != 0 && (opt.rate > 0 || opt.idle > 0))
        die("--counted takes neither --rate nor --idle");
    if (opt.counted != 0 && opt.requests != 0 && !opt.reconnect)
        die("--counted takes --requests only with --reconnect");
    return opt;
}

#endif
