/* TLS sessions: handshakes, data in both directions, and their ends. */
#include "sessions.h"

/* ---- handshakes --------------------------------------------------------- */

static const int versions[] = {TLS12, TLS13};

/* Each version in each role, over sockets of each kind. */
static void each_session(bool threaded, size_t cut)
{
    tls_load();
    struct world *w = world_open();
    if (threaded)
        world_start(w);
    for (int i = 0; i < 8; i++) {
        struct session s;
        session_open(&s, w, i & 4 ? AP_UNIX : AP_TCP, versions[i & 1], i & 2);
        s.cut = cut;
        session_start(&s, 0);
        shake_hands(&s);
        CHECK_EQ(strcmp(ossl.SSL_get_version(s.ssl), i & 1 ? "TLSv1.3" : "TLSv1.2"), 0);
        peer_tells(&s, 1, 0, 1000);
        hear(&s, 1, 0, 1000);
        uint8_t *said = tell(&s, 2, 0, 1000);
        peer_hears(&s, 2, 0, 1000);
        free(said);
        session_close(&s);
    }
    world_close(w);
}

TEST(handshakes)
{
    each_session(false, 0);
}

TEST(handshakes_with_a_thread)
{
    each_session(true, 0);
}

TEST(handshakes_in_single_bytes)
{
    each_session(false, 1);
}

TEST(handshakes_in_single_bytes_with_a_thread)
{
    each_session(true, 1);
}

/* There was no room before it began, and nobody watches for it on a UNIX socket. */
TEST(a_handshake_waits_for_room)
{
    static char memory[64 * 1024];
    tls_load();
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_UNIX, TLS13, false);
    while (ap_conn_send_fds(s.l.conn, memory, sizeof memory, NULL, 0) > 0)
        ;
    CHECK_EQ(ap_conn_drain(s.l.conn, 1, 0), -EAGAIN);
    CHECK_OK(ap_conn_disarm_write(s.l.conn));
    session_start(&s, 0);
    UNTIL(w, ap_conn_queued(s.l.conn) > 0);
    while (recv(s.l.peer, memory, sizeof memory, MSG_DONTWAIT) > 0)
        ;
    shake_hands(&s);
    session_close(&s);
    world_close(w);
}

/* ---- data --------------------------------------------------------------- */

static const size_t sizes[] = {1, 5, 100, 4096, 16384, 16385, 40000, 70000, 200000, 600000};

static void data_both_ways(struct session *s)
{
    uint64_t heard = 0, told = 0;
    for (size_t i = 0; i < AP_ARRAY_SIZE(sizes); i++) {
        size_t n = sizes[i], half = n / 2 + 1;
        peer_encrypt(s, 1, heard, n);
        hear(s, 1, heard, half < n ? half : n);
        if (half < n)
            hear(s, 1, heard + half, n - half);
        heard += n;
        uint8_t *said = tell(s, 2, told, n);
        peer_hears(s, 2, told, n);
        told += n;
        MEANWHILE(s, ap_conn_queued(s->l.conn) == 0);
        free(said);
    }
}

SESSION_TEST(data_both_ways_with_1_2, TLS12, true)
{
    data_both_ways(s);
}

SESSION_TEST(data_both_ways_with_1_3, TLS13, false)
{
    data_both_ways(s);
}

SESSION_TEST(data_both_ways_with_a_thread, TLS13, true)
{
    world_start(w);
    data_both_ways(s);
}

SESSION_TEST(data_in_single_bytes, TLS13, true)
{
    s->cut = 1;
    peer_tells(s, 1, 0, 3000);
    hear(s, 1, 0, 3000);
}

/* Small pieces share records, large ones are not copied, empty ones do no harm. */
SESSION_TEST(pieces_of_all_sizes, TLS13, true)
{
    static const size_t cuts[] = {0, 1, 0, 0, 7, 16000, 400, 50000, 0, 3, 100000, 0};
    ap_piece pieces[AP_ARRAY_SIZE(cuts)];
    size_t all = 0;
    for (size_t i = 0; i < AP_ARRAY_SIZE(cuts); i++)
        all += cuts[i];
    uint8_t *bytes = pattern_make(2, 0, all), *at = bytes;
    for (size_t i = 0; i < AP_ARRAY_SIZE(cuts); at += cuts[i++])
        pieces[i] = (ap_piece){.data = at, .size = cuts[i]};
    CHECK_OK(ap_conn_send(s->l.conn, pieces, AP_ARRAY_SIZE(cuts)));
    peer_hears(s, 2, 0, all);
    MEANWHILE(s, ap_conn_queued(s->l.conn) == 0);
    free(bytes);
}

SESSION_TEST(a_delimiter_is_found_in_plaintext, TLS13, true)
{
    struct link *l = &s->l;
    CHECK_EQ(ap_ssl.write(s->peer, "abc", 3), 3);
    peer_flush(s);
    CHECK_EQ(ap_conn_find(l->conn, 0, "\r\n", 2, 100, 0, 0, NULL, 0), -EAGAIN);
    CHECK_EQ(ap_ssl.write(s->peer, "de\r\nf", 5), 5);
    MEANWHILE(s, told(s, AP_MAIL_READ));
    int64_t found = ap_conn_find(l->conn, 0, "\r\n", 2, 100, 0, 0, NULL, 0);
    CHECK_EQ(found & 0xffff, 7);
}

SESSION_TEST(requests_come_in_plaintext, TLS13, true)
{
    struct link *l = &s->l;
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(ap_conn_request(l->conn, l->pos, 1, NULL, 0), -EAGAIN);
        peer_tells(s, 1, 100 * (uint64_t)i, 100);
        MEANWHILE(s, told(s, AP_MAIL_READ));
        CHECK(ap_conn_request(l->conn, l->pos, 1, NULL, 0) > 0);
        hear(s, 1, 100 * (uint64_t)i, 100);
        link_drop_block(l);
    }
}

/* What is sent during the handshake goes out after it, in its order. */
TEST(output_waits_for_the_handshake)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_TCP, TLS13, true);
    session_start(&s, 0);
    uint8_t *said = pattern_make(2, 0, 100000);
    CHECK_EQ(ap_conn_write(s.l.conn, (char *)said, 50000), 50000);
    CHECK_EQ(ap_conn_write(s.l.conn, (char *)said + 50000, 50000), 100000);
    CHECK_EQ(ap_conn_drain(s.l.conn, 0, 0), -EAGAIN);
    shake_hands(&s);
    peer_hears(&s, 2, 0, 100000);
    MEANWHILE(&s, told(&s, AP_MAIL_WRITE));
    CHECK_EQ(ap_conn_queued(s.l.conn), 0);
    free(said);
    session_close(&s);
    world_close(w);
}

/* ---- a peer that does not read ------------------------------------------- */

static void stall_session(struct session *s)
{
    s->deaf = true;
    CHECK(ap_conn_write(s->l.conn, (char *)much(), MUCH) > 0);
    MEANWHILE(s, !(ready_flags(&s->l) & AP_WRITABLE));
}

/* The rest can be taken back, but for the records that were made. */
SESSION_TEST(output_is_taken_back, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    stall_session(s);
    int64_t left = ap_conn_hold(conn);
    CHECK(left > 0 && left < (int64_t)MUCH);
    CHECK(ap_conn_queued(conn) > left);
    CHECK(ap_conn_queued(conn) - left < (int64_t)(70 * KB));
    s->deaf = false;
    size_t sealed = MUCH - (size_t)left, heard = 0;
    MEANWHILE(s, (heard += peer_decrypt(s, 1, heard, MUCH - heard)) == sealed);
    settle(s->l.w);
    CHECK_EQ(ap_conn_queued(conn), left); /* nothing was made of what is held */
    uint8_t *rest = pattern_make(1, sealed, 5000);
    CHECK_EQ(ap_conn_requeue(conn, &(ap_piece){.data = rest, .size = 5000}, 1), 5000);
    peer_hears(s, 1, sealed, 5000);
    MEANWHILE(s, told(s, AP_MAIL_SENT));
    free(rest);
}

/* Nobody waits for what was given up, as records or not. */
SESSION_TEST(output_is_given_up, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    stall_session(s);
    CHECK_OK(ap_conn_give_up(conn));
    CHECK_EQ(ap_conn_awaited(conn), 0);
    char *more = (char *)pattern_make(1, MUCH, 1000);
    CHECK_OK(ap_conn_write(conn, more, 1000));
    CHECK_EQ(ap_conn_awaited(conn), 1000);
    s->deaf = false;
    for (size_t heard = 0; heard < MUCH + 1000;) {
        peer_turn(s);
        bool mixed = ap_conn_queued(conn) < (int64_t)(70 * KB); /* the last records have both */
        CHECK(mixed || ap_conn_awaited(conn) == 1000);
        heard += peer_decrypt(s, 1, heard, MUCH + 1000 - heard);
    }
    MEANWHILE(s, ap_conn_queued(conn) == 0);
    CHECK_EQ(ap_conn_awaited(conn), 0);
    free(more);
}

/* Key updates want answers, which are bounded: then input waits for the peer. */
SESSION_TEST(answers_are_bounded, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    stall_session(s);
    int64_t queued = ap_conn_queued(conn);
    uint64_t said = 0;
    for (int i = 0; i < 20000; i++) {
        CHECK_EQ(ossl.SSL_key_update(s->peer, 1), 1);
        peer_encrypt(s, 3, said++, 1);
    }
    char memory[16 * 1024];
    for (int n; (n = ossl.BIO_read(s->out, memory, sizeof memory)) > 0;)
        peer_send(&s->l, memory, (size_t)n);
    settle(w);
    CHECK(ap_conn_queued(conn) - queued < (int64_t)(256 * KB));
    CHECK(unread_in_kernel(s->l.fd) > 0);
    s->deaf = false;
    peer_hears(s, 1, 0, MUCH);
    hear(s, 3, 0, said);
}

/* ---- messages of the handshake's kind behind it --------------------------- */

/* Sends the next record that the peer has made. */
static void peer_flush_record(struct session *s)
{
    uint8_t record[5 + 17 * 1024];
    CHECK_EQ(ossl.BIO_read(s->out, record, 5), 5);
    int n = record[3] << 8 | record[4];
    CHECK_EQ(ossl.BIO_read(s->out, record + 5, n), n);
    peer_send(&s->l, record, (size_t)n + 5);
    settle(s->l.w);
}

static void trust_itself(ap_ossl_ctx *ctx)
{
    ap_ossl_bio *bio = ossl.BIO_new_mem_buf(certificate_pem, -1);
    void *certificate = ossl.PEM_read_bio_X509(bio, NULL, NULL, NULL);
    ossl.BIO_free(bio);
    CHECK_EQ(ossl.X509_STORE_add_cert(ossl.SSL_CTX_get_cert_store(ctx), certificate), 1);
    ossl.X509_free(certificate);
}

/* OpenSSL writes nothing until the rest has come. */
TEST(output_waits_for_the_rest_of_a_message)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_TCP, TLS13, false);
    trust_itself(s.ctx);
    ossl.SSL_set_verify(s.peer, AP_OSSL_VERIFY_PEER, NULL); /* its tickets have a certificate */
    CHECK_EQ(ap_ssl.ctrl(s.peer, SET_FRAGMENT, 512, NULL), 1);
    s.mute = true;
    session_start(&s, 0);
    shake_hands(&s);
    peer_flush_record(&s); /* the beginning of a ticket */
    CHECK_EQ(ap_ssl.is_init_finished(s.ssl), 0);
    uint8_t *said = tell(&s, 2, 0, 1000), *more = tell(&s, 2, 1000, 1000);
    CHECK_EQ(ap_conn_queued(s.l.conn), 2000);
    settle(w);
    CHECK_EQ(status_of(&s).phase, AP_TLS_OPEN);
    CHECK_EQ(ap_conn_drain(s.l.conn, 0, 0), -EAGAIN);
    s.mute = false;
    peer_hears(&s, 2, 0, 2000); /* with the rest of the ticket */
    MEANWHILE(&s, told(&s, AP_MAIL_WRITE));
    free(said);
    free(more);
    session_close(&s);
    world_close(w);
}

SESSION_TEST(another_handshake_is_refused, TLS12, true)
{
    CHECK_EQ(ossl.SSL_renegotiate(s->peer), 1);
    ap_ssl.do_handshake(s->peer);
    peer_flush(s);
    settle(w);
    CHECK_EQ(status_of(s).phase, AP_TLS_OPEN);
    uint8_t *said = tell(s, 2, 0, 10);
    char byte;
    int rc;
    MEANWHILE(s, (ap_ssl.err_clear(), rc = ap_ssl.read(s->peer, &byte, 1)) > 0 ||
                     ap_ssl.get_error(s->peer, rc) != AP_OSSL_ERROR_WANT_READ);
    free(said);
}
