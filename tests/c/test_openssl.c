/* openssl.c over the OpenSSL of this machine, which the test loads as Python would. */
#include "check.h"
#include "openssl.h"

#include <dlfcn.h>
#include <pthread.h>

#define PEER_AND_REQUIRE (AP_OSSL_VERIFY_PEER | AP_OSSL_VERIFY_REQUIRE)

/* What is needed to make SSL objects. */
struct library {
    void *handle;
    char path[4096];
    unsigned long version;
    ap_ossl_ctx *(*ctx_new)(const void *);
    void (*ctx_free)(ap_ossl_ctx *);
    uint64_t (*ctx_set_options)(ap_ossl_ctx *, uint64_t);
    void (*ctx_set_verify)(ap_ossl_ctx *, int, void *);
    ap_ossl_ssl *(*ssl_new)(ap_ossl_ctx *);
    const void *(*method)(void);
};

static void *must_find(const struct library *library, const char *name)
{
    void *symbol = dlsym(library->handle, name);
    if (!symbol)
        CHECK_FAIL("%s is missing", name);
    return symbol;
}

static struct library library_open(int flags)
{
    struct library l = {0};
    l.handle = dlopen("libssl.so.3", RTLD_NOW | flags);
    if (!l.handle)
        l.handle = dlopen("libssl.so.1.1", RTLD_NOW | flags);
    if (!l.handle)
        SKIP("no libssl is installed here");
    Dl_info info;
    CHECK(dladdr(must_find(&l, "SSL_new"), &info) != 0);
    snprintf(l.path, sizeof l.path, "%s", info.dli_fname);
    unsigned long (*version_num)(void);
    *(void **)&version_num = must_find(&l, "OpenSSL_version_num");
    l.version = version_num();
    *(void **)&l.ctx_new = must_find(&l, "SSL_CTX_new");
    *(void **)&l.ctx_free = must_find(&l, "SSL_CTX_free");
    *(void **)&l.ctx_set_options = must_find(&l, "SSL_CTX_set_options");
    *(void **)&l.ctx_set_verify = must_find(&l, "SSL_CTX_set_verify");
    *(void **)&l.ssl_new = must_find(&l, "SSL_new");
    *(void **)&l.method = must_find(&l, "TLS_method");
    return l;
}

TEST(the_table_is_that_library)
{
    struct library l = library_open(RTLD_LOCAL);
    CHECK_EQ(ap_tls_load(l.path, l.version), 0);
#define SAME(name, result, symbol, parameters) \
    CHECK((uintptr_t)ap_ssl.name == (uintptr_t)must_find(&l, #symbol));
    AP_OPENSSL_FUNCTIONS(SAME)
#undef SAME
}

TEST(the_library_is_kept)
{
    struct library l = library_open(RTLD_LOCAL);
    CHECK_EQ(ap_tls_load(l.path, l.version), 0);
    CHECK(dlclose(l.handle) == 0);
    CHECK_EQ(ap_ssl.version_num(), l.version);
}

TEST(loading_again_changes_nothing)
{
    struct library l = library_open(RTLD_LOCAL);
    CHECK_EQ(ap_tls_load(l.path, l.version), 0);
    ap_openssl before = ap_ssl;
    CHECK_EQ(ap_tls_load(l.path, l.version), 0);
    CHECK_EQ(ap_tls_load(l.path, l.version + 0x1000), -EPROTO);
    CHECK(memcmp(&before, &ap_ssl, sizeof before) == 0);
}

TEST(another_version_is_refused)
{
    struct library l = library_open(RTLD_LOCAL);
    CHECK_EQ(ap_tls_load(l.path, l.version + 0x10), -EPROTO);
    CHECK_EQ(ap_tls_load(l.path, 0), -EPROTO);
    CHECK(ap_ssl.read == NULL);
    CHECK_EQ(ap_tls_load(l.path, l.version), 0); /* the failures have left nothing behind */
}

/* It stays in a process that has had it, so another one looks where it is. */
TEST(nothing_is_loaded_that_was_not)
{
    struct library l = {0};
    int ends[2], status = 0;
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) {
        l = library_open(RTLD_LOCAL);
        CHECK(write(ends[1], &l, sizeof l) == (ssize_t)sizeof l);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    if (status != 0)
        SKIP("no libssl is installed here");
    CHECK(read(ends[0], &l, sizeof l) == (ssize_t)sizeof l);
    close(ends[0]);
    close(ends[1]);

    CHECK_EQ(ap_tls_load(l.path, l.version), -ENOENT);
    CHECK_EQ(ap_tls_load("/nonexistent/_ssl.so", l.version), -ENOENT);
    CHECK(dlopen(l.path, RTLD_NOW | RTLD_NOLOAD) == NULL);
}

TEST(a_library_without_openssl_is_refused)
{
    struct library l = library_open(RTLD_LOCAL);
    void *loaded = dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD);
    if (!loaded)
        SKIP("the C library has another name here");
    CHECK_EQ(ap_tls_load("libc.so.6", l.version), -ENOSYS);
    CHECK(dlclose(loaded) == 0);
}

/* Global symbols are found by a lookup in the program, but are not the program's. */
TEST(a_global_library_is_not_the_program)
{
    struct library l = library_open(RTLD_GLOBAL);
    CHECK(dlsym(RTLD_DEFAULT, "SSL_read") != NULL);
    CHECK_EQ(ap_tls_load(NULL, l.version), -ENOSYS);
    CHECK(ap_ssl.read == NULL);
}

TEST(objects_are_checked)
{
    struct library l = library_open(RTLD_LOCAL);
    ap_ossl_ctx *ctx = l.ctx_new(l.method()), *other = l.ctx_new(l.method());
    CHECK(ctx && other);
    ap_ossl_ssl *ssl = l.ssl_new(ctx);
    CHECK(ssl != NULL);
    CHECK_EQ(ap_tls_check(ssl, ctx, 0, 0), -ENOSYS);
    CHECK_EQ(ap_tls_load(l.path, l.version), 0);

    unsigned long options = (unsigned long)ap_ssl.ctx_get_options(ctx);
    CHECK_EQ(ap_tls_check(ssl, ctx, options, 0), 1);
    CHECK_EQ(ap_tls_check(ssl, other, options, 0), 0);
    CHECK_EQ(ap_tls_check(ssl, ctx, options ^ 0x4000, 0), 0);
    CHECK_EQ(ap_tls_check(ssl, ctx, options, PEER_AND_REQUIRE), 0);

    l.ctx_set_options(ctx, 0x4000); /* SSL_OP_NO_TICKET */
    l.ctx_set_verify(ctx, PEER_AND_REQUIRE | 4, NULL);
    CHECK_EQ(ap_tls_check(ssl, ctx, options | 0x4000, PEER_AND_REQUIRE), 1);

    ap_ssl.free(ssl);
    l.ctx_free(ctx);
    l.ctx_free(other);
}

struct loader {
    const struct library *library;
    pthread_barrier_t *start;
    int result;
};

static void *load_at_once(void *argument)
{
    struct loader *loader = argument;
    pthread_barrier_wait(loader->start);
    loader->result = ap_tls_load(loader->library->path, loader->library->version);
    if (loader->result == 0 && ap_ssl.version_num() != loader->library->version)
        loader->result = 1;
    return NULL;
}

TEST(threads_may_load_at_once)
{
    enum { THREADS = 4 };
    struct library l = library_open(RTLD_LOCAL);
    pthread_barrier_t start;
    pthread_t threads[THREADS];
    struct loader loaders[THREADS];
    CHECK(pthread_barrier_init(&start, NULL, THREADS) == 0);
    for (int i = 0; i < THREADS; i++) {
        loaders[i] = (struct loader){&l, &start, -1};
        CHECK(pthread_create(&threads[i], NULL, load_at_once, &loaders[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK_EQ(loaders[i].result, 0);
    }
    pthread_barrier_destroy(&start);
}

TEST(the_child_of_a_fork_can_load)
{
    struct library l = library_open(RTLD_LOCAL);
    pid_t child = fork();
    if (child == 0) {
        CHECK_EQ(ap_fork_child(), 0);
        CHECK_EQ(ap_tls_load(l.path, l.version), 0);
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
}
