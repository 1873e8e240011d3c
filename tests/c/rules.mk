# Build rules for the C tests: every tests/c/test_*.c is a program, linked with all of csrc/*.c, and
# built three times. Included by the Makefile; run with `make test-c`, or one variant with
# `make test-c-plain`, `test-c-asan`, `test-c-tsan`.

C_VARIANTS := plain asan tsan
C_SOURCES  := $(wildcard csrc/*.c)
C_TESTS    := $(patsubst tests/c/%.c,%,$(wildcard tests/c/test_*.c))

# Warnings are errors here and nowhere else; `make test-c WERROR=` builds with a compiler that
# knows warnings ours does not.
WERROR ?= -Werror
C_FLAGS := -std=c11 -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wstrict-prototypes \
           -Wmissing-prototypes $(WERROR) -fvisibility=hidden -pthread -g \
           -Icsrc -Itests/c
C_FLAGS_plain := -O2
C_FLAGS_asan  := -O1 -DAP_DEBUG=1 -DCHECK_TIMEOUT=180 -fno-omit-frame-pointer \
                 -fsanitize=address,undefined -fno-sanitize-recover=all
C_FLAGS_tsan  := -O1 -DAP_DEBUG=1 -DCHECK_TIMEOUT=180 -fno-omit-frame-pointer -fsanitize=thread

# dlopen() is in a library of its own before glibc 2.34. Exported, this test's functions can be found.
C_LINK_test_openssl_builtin := -rdynamic

.PHONY: test-c $(C_VARIANTS:%=test-c-%)
test-c: $(C_VARIANTS:%=test-c-%)

# $(1): the variant
define c_variant
build/c/$(1)/csrc/%.o: csrc/%.c tests/c/rules.mk | check-c
	@mkdir -p $$(@D)
	@$$(CC) $$(C_FLAGS) $$(C_FLAGS_$(1)) -MMD -MP -c $$< -o $$@

build/c/$(1)/%.o: tests/c/%.c tests/c/rules.mk | check-c
	@mkdir -p $$(@D)
	@$$(CC) $$(C_FLAGS) $$(C_FLAGS_$(1)) -MMD -MP -c $$< -o $$@

build/c/$(1)/test_%: build/c/$(1)/test_%.o $(C_SOURCES:csrc/%.c=build/c/$(1)/csrc/%.o)
	@$$(CC) $$(C_FLAGS) $$(C_FLAGS_$(1)) $$^ $$(C_LINK_$$(@F)) -ldl -o $$@

.PHONY: build-c-$(1)
build-c-$(1): $(C_TESTS:%=build/c/$(1)/%)

# Built by a make of its own, for this one may have been started without -j.
test-c-$(1): | check-c
	@$(MAKE) --no-print-directory -j$(JOBS) build-c-$(1)
	@scripts/run-c-tests $(1) $(sort $(C_TESTS:%=build/c/$(1)/%))

.SECONDARY: $(C_TESTS:%=build/c/$(1)/%.o) $(C_SOURCES:csrc/%.c=build/c/$(1)/csrc/%.o)
-include $(C_SOURCES:csrc/%.c=build/c/$(1)/csrc/%.d) $(C_TESTS:%=build/c/$(1)/%.d)
endef
$(foreach variant,$(C_VARIANTS),$(eval $(call c_variant,$(variant))))
