/* openssl.c where `_ssl` is built in: this program has functions of OpenSSL's names, and exports
 * them (rules.mk). What they answer to the questions for their version is up to each test.
 */
#include "check.h"
#include "openssl.h"

static unsigned long number = 0x30000020ul;
static const char *text = "OpenSSL 3.0.2 15 Mar 2022";

/* Every one takes no arguments and returns a word: only these two are ever called. */
static uintptr_t answer(const char *function)
{
    if (strcmp(function, "OpenSSL_version_num") == 0)
        return number;
    CHECK(strcmp(function, "OpenSSL_version") == 0);
    return (uintptr_t)text;
}

#define BUILT_IN(name, result, symbol, parameters)                        \
    __attribute__((visibility("default"))) extern uintptr_t symbol(void); \
    uintptr_t symbol(void)                                                \
    {                                                                     \
        return answer(#symbol);                                           \
    }
AP_OPENSSL_FUNCTIONS(BUILT_IN)
#undef BUILT_IN

TEST(the_program_has_it)
{
    CHECK_EQ(ap_tls_load(NULL, number), 0);
#define SAME(name, result, symbol, parameters) CHECK((uintptr_t)ap_ssl.name == (uintptr_t)symbol);
    AP_OPENSSL_FUNCTIONS(SAME)
#undef SAME
}

TEST(only_known_versions_will_do)
{
    static const unsigned long known[] = {0x10101000ul, 0x1010117ful, 0x30000000ul, 0x30f00010ul};
    static const unsigned long unknown[] = {0x1000217ful, 0x1010007ful, 0x40000000ul};
    for (size_t i = 0; i < AP_ARRAY_SIZE(unknown); i++) {
        number = unknown[i];
        CHECK_EQ(ap_tls_load(NULL, number), -EPROTO);
    }
    for (size_t i = 0; i < AP_ARRAY_SIZE(known); i++) {
        number = known[i];
        CHECK_EQ(ap_tls_load(NULL, number), 0);
    }
}

TEST(relatives_are_refused)
{
    static const char *const relatives[] = {"LibreSSL 3.8.2", "BoringSSL", "AWS-LC 1.30.0",
                                            "OpenSSL", ""};
    for (size_t i = 0; i < AP_ARRAY_SIZE(relatives); i++) {
        text = relatives[i];
        CHECK_EQ(ap_tls_load(NULL, number), -EPROTO);
    }
    CHECK(ap_ssl.read == NULL);
}
