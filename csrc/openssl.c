/* Binding to OpenSSL: at run time, to the very library that `_ssl` calls.
 *
 * The SSL objects are made by Python's ssl module, so they must be used by the same OpenSSL. A
 * process can have several: `_ssl` may be linked statically, and other extension modules bring
 * along their own. So nothing is linked here, and nothing is loaded: the shared object that
 * `_ssl` is in has been, and a lookup in it and in what it depends on finds what it calls itself.
 *
 * If `_ssl` is built in, that would be a lookup in everything global. Then only functions count
 * that lie in the program itself.
 *
 * What is found must be OpenSSL, not a relative of the same names whose structs, codes and
 * promises differ, and of the version that `_ssl` says it has. A version that is newer than those
 * that this table was compared with is refused as well: there is another way to do TLS.
 *
 * The library stays: the handle is never closed.
 */
#include "openssl.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/auxv.h>

#define OLDEST 0x10101000ul /* 1.1.1 */
#define NEWEST 0x3ffffffful /* 3.x */

ap_openssl ap_ssl;

static pthread_mutex_t load_mutex = PTHREAD_MUTEX_INITIALIZER;
static bool loaded; /* under load_mutex: ap_ssl is complete */

static const struct {
    const char *name;
    size_t offset; /* in the table */
} symbols[] = {
#define SYMBOL(name, result, symbol, parameters) {#symbol, offsetof(ap_openssl, name)},
    AP_OPENSSL_FUNCTIONS(SYMBOL)
#undef SYMBOL
};

/* Whether the symbol lies in the object that the process was started from. */
static bool is_in_program(const void *symbol)
{
    Dl_info found, program;
    const void *headers = (const void *)getauxval(AT_PHDR);
    return dladdr(symbol, &found) && dladdr(headers, &program) &&
           found.dli_fbase == program.dli_fbase;
}

static void *find(void *handle, const char *name, bool program)
{
    void *symbol = dlsym(handle, name);
    return symbol && program && !is_in_program(symbol) ? NULL : symbol;
}

/* Fills the table. 0; -ENOSYS. */
static int resolve(void *handle, bool program, ap_openssl *table)
{
    for (size_t i = 0; i < AP_ARRAY_SIZE(symbols); i++) {
        void *symbol = find(handle, symbols[i].name, program);
        if (!symbol)
            return -ENOSYS;
        /* POSIX promises that a pointer to a function survives this, ISO C does not */
        memcpy((char *)table + symbols[i].offset, &symbol, sizeof symbol);
    }
    return 0;
}

static int check_version(const ap_openssl *table, unsigned long version)
{
    static const char name[] = "OpenSSL ";
    if (version < OLDEST || version > NEWEST || table->version_num() != version)
        return -EPROTO;
    return strncmp(table->version(0), name, sizeof name - 1) == 0 ? 0 : -EPROTO;
}

static int load(const char *path, unsigned long version)
{
    ap_openssl table;
    void *handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!handle)
        return -ENOENT;
    int rc = resolve(handle, !path, &table);
    if (rc == 0)
        rc = check_version(&table, version);
    if (rc == 0)
        ap_ssl = table;
    else
        dlclose(handle);
    return rc;
}

int ap_tls_load(const char *path, unsigned long version)
{
    /* OpenSSL's options would have different widths from version to version */
    if (sizeof(long) < sizeof(uint64_t))
        return -ENOSYS;
    pthread_mutex_lock(&load_mutex);
    int rc;
    if (loaded)
        rc = ap_ssl.version_num() == version ? 0 : -EPROTO;
    else
        rc = load(path, version);
    loaded |= rc == 0;
    pthread_mutex_unlock(&load_mutex);
    return rc;
}

int ap_tls_check(const void *ssl, const void *ctx, unsigned long options, int verify_mode)
{
    pthread_mutex_lock(&load_mutex);
    bool ready = loaded;
    pthread_mutex_unlock(&load_mutex);
    if (!ready)
        return -ENOSYS;
    const int mask = AP_OSSL_VERIFY_PEER | AP_OSSL_VERIFY_REQUIRE;
    return ap_ssl.get_ctx(ssl) == ctx && ap_ssl.ctx_get_options(ctx) == options &&
           (ap_ssl.ctx_get_verify_mode(ctx) & mask) == verify_mode;
}

void ap_tls_reset(void)
{
    pthread_mutex_init(&load_mutex, NULL);
}
