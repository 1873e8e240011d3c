/* A minimal unit test framework for C: each test runs in a process of its own.
 *
 *     #include "check.h"
 *
 *     TEST(block_counts_its_references)
 *     {
 *         CHECK(block != NULL);
 *         CHECK_EQ(block->refs, 1);
 *     }
 *
 * TEST registers itself; main() is here, so a program includes this file once. Each test runs in a
 * process of its own: a crash, a sanitizer's report or a hang fails that test and no other. A test
 * passes when its function returns with every check held and as many file descriptors open as at
 * its start. Checks stay on in optimised builds and may be made in any thread.
 *
 *     ./test_block              run all
 *     ./test_block counts       run those whose name contains "counts"
 *     ./test_block --here NAME  run one in this process, for a debugger
 */
#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef CHECK_TIMEOUT
#define CHECK_TIMEOUT 60 /* seconds for one test */
#endif

enum { CHECK_FAILED = 1, CHECK_SKIPPED = 77 };

struct check_test {
    const char *name;
    void (*run)(void);
    struct check_test *next;
};

static struct check_test *check_first;
static struct check_test **check_last = &check_first;

#define TEST(name_)                                                       \
    static void name_(void);                                              \
    __attribute__((constructor)) static void check_register_##name_(void) \
    {                                                                     \
        static struct check_test test = {#name_, name_, NULL};            \
        *check_last = &test;                                              \
        check_last = &test.next;                                          \
    }                                                                     \
    static void name_(void)

/* Ends the test at once, from whichever thread. */
#define CHECK_FAIL(...)                                 \
    do {                                                \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__); \
        fprintf(stderr, __VA_ARGS__);                   \
        fputc('\n', stderr);                            \
        check_leave(CHECK_FAILED);                      \
    } while (0)

#define CHECK(condition)                         \
    do {                                         \
        if (!(condition))                        \
            CHECK_FAIL("CHECK(%s)", #condition); \
    } while (0)

/* For integers of any type, each evaluated once. */
#define CHECK_EQ(actual, expected)                                                      \
    do {                                                                                \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);     \
        if (actual_ != expected_)                                                       \
            CHECK_FAIL("CHECK_EQ(%s, %s): %lld, not %lld", #actual, #expected, actual_, \
                       expected_);                                                      \
    } while (0)

/* For results that are >= 0 or -errno. */
#define CHECK_OK(result)                                                                      \
    do {                                                                                      \
        long long result_ = (long long)(result);                                              \
        if (result_ < 0)                                                                      \
            CHECK_FAIL("CHECK_OK(%s): %lld (%s)", #result, result_, strerror((int)-result_)); \
    } while (0)

/* For `length` bytes at `actual` against as many at `expected`. */
#define CHECK_BYTES(actual, expected, length)                                                 \
    do {                                                                                      \
        const unsigned char *actual_ = (const void *)(actual);                                \
        const unsigned char *expected_ = (const void *)(expected);                            \
        size_t length_ = (size_t)(length);                                                    \
        for (size_t at_ = 0; at_ < length_; at_++) {                                          \
            if (actual_[at_] != expected_[at_])                                               \
                CHECK_FAIL("CHECK_BYTES(%s, %s): at %zu of %zu: 0x%02x, not 0x%02x", #actual, \
                           #expected, at_, length_, actual_[at_], expected_[at_]);            \
        }                                                                                     \
    } while (0)

#define SKIP(reason)                              \
    do {                                          \
        fprintf(stderr, "skipped: %s\n", reason); \
        check_leave(CHECK_SKIPPED);               \
    } while (0)

__attribute__((noreturn)) static inline void check_leave(int status)
{
    fflush(NULL);
    _exit(status);
}

static int check_open_files(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");
    if (directory == NULL)
        return 0;
    while (readdir(directory) != NULL)
        count++;
    closedir(directory);
    return count;
}

static void check_run(const struct check_test *test)
{
    int before = check_open_files();
    test->run();
    int after = check_open_files();
    if (after != before) {
        fprintf(stderr, "%s: %+d open file descriptors since its start\n", test->name,
                after - before);
        check_leave(CHECK_FAILED);
    }
}

/* Waits for the test's process, and kills it when its time is over. SIGCHLD is blocked. */
static bool check_wait(pid_t child, int *status)
{
    sigset_t chld;
    struct timespec end, now;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += CHECK_TIMEOUT;
    while (waitpid(child, status, WNOHANG) == 0) {
        struct timespec second = {1, 0};
        sigtimedwait(&chld, NULL, &second);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec >= end.tv_sec) {
            kill(child, SIGKILL);
            waitpid(child, status, 0);
            return false;
        }
    }
    return true;
}

/* Runs one test in a child; says how it went in one line. */
static int check_one(const struct check_test *test)
{
    int status = 0;
    sigset_t chld, before;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, &before);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        sigprocmask(SIG_SETMASK, &before, NULL);
        check_run(test);
        exit(0); /* not _exit: the leak sanitizer reports at exit */
    }
    bool in_time = child > 0 && check_wait(child, &status);
    sigprocmask(SIG_SETMASK, &before, NULL);

    if (child < 0)
        printf("FAIL %s: fork failed\n", test->name);
    else if (!in_time)
        printf("FAIL %s: still running after %d s\n", test->name, CHECK_TIMEOUT);
    else if (WIFSIGNALED(status))
        printf("FAIL %s: killed by signal %d (%s)\n", test->name, WTERMSIG(status),
               strsignal(WTERMSIG(status)));
    else if (WEXITSTATUS(status) == CHECK_SKIPPED)
        printf("skip %s\n", test->name);
    else if (WEXITSTATUS(status) != 0)
        printf("FAIL %s: exit status %d\n", test->name, WEXITSTATUS(status));
    else
        printf("ok %s\n", test->name);

    if (child < 0 || !in_time || WIFSIGNALED(status))
        return CHECK_FAILED;
    return WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[argc - 1] : "";
    bool here = argc > 2 && strcmp(argv[1], "--here") == 0;
    int passed = 0, failed = 0, skipped = 0;

    for (struct check_test *test = check_first; test != NULL; test = test->next) {
        if (here && strcmp(test->name, part) == 0) {
            check_run(test);
            return 0;
        }
        if (here || strstr(test->name, part) == NULL)
            continue;
        int result = check_one(test);
        passed += result == 0;
        skipped += result == CHECK_SKIPPED;
        failed += result != 0 && result != CHECK_SKIPPED;
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0 || passed + skipped == 0;
}

#endif
