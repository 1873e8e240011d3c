/* TLS sessions that fail, that are late, or that refuse what is asked of them. */
#include "sessions.h"

/* ---- failures --------------------------------------------------------------- */

/* The peer is told why. */
static bool peer_got_alert(struct session *s)
{
    char byte;
    if (s->result != 1)
        return s->error == AP_OSSL_ERROR_SSL;
    ap_ssl.err_clear();
    int rc = ap_ssl.read(s->peer, &byte, 1);
    return rc <= 0 && ap_ssl.get_error(s->peer, rc) == AP_OSSL_ERROR_SSL;
}

NEW_SESSION_TEST(garbage_is_no_handshake, TLS13, true)
{
    session_start(s, 0);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, 0), -EAGAIN);
    peer_send(&s->l, "GET / HTTP/1.1\r\n\r\n", 18);
    await(w, s->l.id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, 0), AP_ETLS);
    ap_tls_status status = status_of(s);
    CHECK_EQ(status.phase, AP_TLS_FAILED);
    CHECK_EQ(status.kind, AP_OSSL_ERROR_SSL);
    CHECK_EQ(strcmp(status.reason, "http request"), 0);
    CHECK_EQ(want(&s->l, 1), AP_ETLS);
    CHECK_EQ(ap_conn_write(s->l.conn, "a", 1), AP_ETLS);
    CHECK_EQ(ap_conn_say_goodbye(s->l.conn), AP_ETLS);
}

SESSION_TEST(garbage_is_no_record, TLS13, true)
{
    peer_tells(s, 1, 0, 10);
    peer_send(&s->l, "\x17\x03\x03\0\x20 thirty two bytes of anything ...", 37);
    hear(s, 1, 0, 10);
    ends_with(s, AP_ETLS);
    CHECK_EQ(status_of(s).kind, AP_OSSL_ERROR_SSL);
    MEANWHILE(s, peer_got_alert(s));
}

NEW_SESSION_TEST(a_certificate_is_refused, TLS13, false)
{
    ossl.SSL_set_verify(s->ssl, AP_OSSL_VERIFY_PEER, NULL);
    session_start(s, 0);
    CHECK_EQ(shake(s), AP_ETLS);
    CHECK_EQ(status_of(s).verify, 18); /* X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT */
    CHECK(strstr(status_of(s).certificate, "self") != NULL);
    MEANWHILE(s, peer_got_alert(s));
}

NEW_SESSION_TEST(an_alert_is_received, TLS12, true)
{
    ossl.SSL_set_verify(s->peer, AP_OSSL_VERIFY_PEER, NULL);
    session_start(s, 0);
    CHECK_EQ(shake(s), AP_ETLS);
    CHECK_EQ(status_of(s).kind, AP_OSSL_ERROR_SSL);
    CHECK(strstr(status_of(s).reason, "alert") != NULL);
}

/* A client of TLS 1.3 may have sent much by the time its certificate is refused: the alert would
 * be lost if the close made that an RST. */
NEW_SESSION_TEST(an_alert_survives_the_close, TLS13, true)
{
    struct link *l = &s->l;
    ossl.SSL_set_verify(s->ssl, AP_OSSL_VERIFY_PEER, NULL);
    s->mute = true;
    session_start(s, 0);
    CHECK_EQ(ap_conn_shake(l->conn, 0, 0), -EAGAIN);
    MEANWHILE(s, s->result == 1);
    peer_encrypt(s, 1, 0, 100000);
    s->mute = false;
    peer_flush(s);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_shake(l->conn, 0, 0), AP_ETLS);
    CHECK(unread_in_kernel(l->fd) > 0);
    CHECK_EQ(ap_conn_linger(l->conn, 0, 0), -EAGAIN);
    UNTIL(w, unread_in_kernel(l->fd) == 0);
    MEANWHILE(s, peer_got_alert(s));
    CHECK_OK(shutdown(l->peer, SHUT_WR));
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_linger(l->conn, 0, 0), 0);
}

NEW_SESSION_TEST(a_handshake_has_a_deadline, TLS13, true)
{
    session_start(s, 0);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, ap_now() + 20 * MS), -EAGAIN);
    peer_send(&s->l, "\x16\x03", 2);
    await(w, s->l.id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, ap_now() - 1), AP_ELATE);
    CHECK(status_of(s).begun);
    CHECK_EQ(status_of(s).lasted, 0);
}

/* What has come in time is activity, though the session stands still. */
SESSION_TEST(a_session_that_is_held_is_not_idle, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_OK(ap_conn_hold_tls(conn));
    peer_tells(s, 1, 0, 10);
    settle(w);
    CHECK_OK(ap_conn_set_idle(conn, 1));
    for (int i = 0; i < 5; i++)
        step(w, 20);
    CHECK_OK(ap_conn_set_idle(conn, 0));
    CHECK_OK(ap_conn_release_tls(conn));
    hear(s, 1, 0, 10);
}

/* ---- what a session refuses -------------------------------------------------- */

SESSION_TEST(what_would_pass_by_the_session_is_refused, TLS13, true)
{
    CHECK_EQ(ap_conn_start_tls(s->l.conn, 0, s->ssl, 0), -EBUSY);
    CHECK_EQ(ap_conn_detach(s->l.conn, 0), -EBUSY);
}

TEST(descriptors_do_not_pass_by_the_session)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    int fd = 0;
    session_open(&s, w, AP_UNIX, TLS13, true);
    session_start(&s, 0);
    shake_hands(&s);
    CHECK_EQ(ap_conn_send_fds(s.l.conn, "a", 1, &fd, 1), -EBUSY);
    session_close(&s);
    world_close(w);
}

NEW_SESSION_TEST(a_session_needs_a_quiet_connection, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_EQ(want(&s->l, 1), -EAGAIN);
    CHECK_EQ(ap_conn_start_tls(conn, 0, s->ssl, 0), -EBUSY);
    CHECK_OK(ap_conn_disarm_read(conn));
    CHECK_EQ(ap_conn_shake(conn, 0, 0), -EINVAL);
    CHECK_EQ(ap_conn_say_goodbye(conn), -EINVAL);
    CHECK_EQ(ap_conn_hold_tls(conn), -EBADF);
    CHECK(ap_conn_write(conn, (char *)much(), MUCH) > 0);
    CHECK_EQ(ap_conn_start_tls(conn, 0, s->ssl, 0), -EBUSY);
    CHECK_OK(ap_conn_close(conn, 0, 0));
    CHECK_EQ(ap_conn_start_tls(conn, 0, s->ssl, 0), -EBADF);
}
