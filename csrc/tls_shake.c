/* TLS handshakes: computed in a thread that neither a loop nor a driver waits for.
 *
 * A handshake takes about a millisecond of arithmetic. A loop that drives would stall for each, and
 * a storm of new clients would stop all others. So its steps are jobs (jobs.c): while OpenSSL
 * computes, the session is held and the slot is not locked. Between the steps whatever has come is
 * received by the same thread; the driver only says that something has.
 *
 *   who            does what
 *   the driver     pushes a job when the socket is readable, and sends records that the kernel did
 *                  not take, but not while a step is being computed
 *   a job          makes steps until OpenSSL wants more than has come, or is done, or has failed;
 *                  a push meanwhile makes it look once more
 *   the loop       waits (AP_WANT_SESSION), with a deadline as for any read. It may close the
 *                  connection at any time
 */
#include "tls_shake.h"

#include "bytes.h"
#include "clock.h"
#include "connection.h"
#include "gate.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "jobs.h"
#include "openssl.h"
#include "receive.h"
#include "slot.h"
#include "tls.h"
#include "tls_output.h"

#define AT_ONCE (16u * 1024) /* bytes received */
#define STEPS_AT_ONCE 16     /* then others have their turn */

bool ap_tls_wants_step(const ap_conn *conn)
{
    const ap_tls *tls = conn->tls;
    if (tls->phase != AP_TLS_SHAKING || conn->read_end || conn->discarding)
        return false;
    bool begins = !tls->server && !tls->stepped;
    return begins || ap_bytes_size(&tls->ahead) || (conn->slot.ready & AP_READABLE);
}

/* ---- one step --------------------------------------------------------- */

/* Whoever waits for it looks again. */
static void tell(ap_conn *conn)
{
    if (ap_input_over(conn))
        ap_hub_post(&conn->slot, AP_MAIL_READ);
}

/* Without the mutex. The connection may be closed afterwards. */
static int compute(ap_conn *conn, int *kind)
{
    ap_tls *tls = conn->tls;
    size_t size = ap_bytes_size(&tls->ahead);
    tls->in = ap_bytes_front(&tls->ahead);
    tls->in_size = size;
    tls->stepped = true;
    tls->computing = true;
    ap_tls_hold(tls);
    ap_slot_unlock(&conn->slot);
    ap_gate_enter();
    ap_ssl.err_clear();
    int rc = ap_ssl.do_handshake(tls->ssl);
    *kind = ap_ssl.get_error(tls->ssl, rc);
    ap_gate_leave();
    ap_slot_lock(&conn->slot);
    ap_bytes_consume(&tls->ahead, size - tls->in_size);
    tls->in_size = 0;
    tls->computing = false;
    ap_tls_release(conn);
    return rc;
}

/* More ciphertext. False: there is none yet, or there never will be. */
static bool receive_more(ap_conn *conn)
{
    uint8_t memory[AT_ONCE];
    size_t got = 0;
    if ((conn->slot.ready & AP_READABLE) && !conn->read_end)
        got = ap_receive(conn, memory, sizeof memory);
    if (got && !ap_bytes_append(&conn->tls->ahead, memory, got)) {
        ap_tls_break(conn, -ENOMEM);
        return false;
    }
    ap_conn_learn(conn);
    if (!conn->read_end)
        return got > 0;
    ap_tls_cut_off(conn);
    tell(conn);
    return false;
}

static void succeed(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    int64_t lasted = ap_now() - tls->began;
    tls->lasted = lasted > 0 ? lasted : 1;
    tls->resumed = ap_ssl.session_reused(tls->ssl) != 0;
    tls->phase = AP_TLS_OPEN;
    if (ap_bytes_size(&tls->ahead))
        conn->slot.ready |= AP_READABLE; /* this is read first */
    if ((conn->slot.ready & AP_READABLE) || conn->out_bytes)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    tell(conn);
}

static bool is_shaking(const ap_conn *conn)
{
    return !conn->slot.closed && conn->tls && conn->tls->phase == AP_TLS_SHAKING &&
           !conn->tls->held && !conn->read_end && !conn->discarding;
}

/* With the mutex, before and after. A peer may send more than a handshake has: from then on it is
 * pushed behind all others. */
static void shake(ap_conn *conn)
{
    for (int steps = 0; is_shaking(conn); steps++) {
        if (steps == STEPS_AT_ONCE) {
            conn->tls->endless = true;
            ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
            return;
        }
        int kind, rc = compute(conn, &kind);
        if (conn->slot.closed)
            return;
        ap_tls_push(conn);
        if (rc == 1)
            succeed(conn);
        else if (kind != AP_OSSL_ERROR_WANT_READ)
            ap_tls_fail(conn, rc);
        else if (!receive_more(conn))
            break;
    }
    if (!conn->slot.closed)
        tell(conn); /* it may wait for a pause only */
}

/* ---- jobs ------------------------------------------------------------- */

void ap_tls_job(ap_slot *slot)
{
    ap_conn *conn = ap_conn_of(slot);
    ap_slot_lock(slot);
    shake(conn);
    ap_slot_unlock(slot);
}

void ap_tls_step_later(ap_conn *conn)
{
    const ap_tls *tls = conn->tls;
    int rc = ap_jobs_push(&conn->slot, tls->stepped && !tls->endless);
    if (rc < 0 && rc != -ECANCELED) /* nothing moves any more when the poller is stopped */
        shake(conn);
}

/* ---- the loop's wait -------------------------------------------------- */

static int wait(ap_conn *conn, bool until_pause, int64_t deadline)
{
    if (!conn->tls)
        return -EINVAL;
    if (conn->tls->lasted) /* whatever has become of the session since then */
        return 0;
    if (conn->read_end)
        return conn->read_end;
    if (deadline && ap_now() >= deadline) {
        ap_count(&conn->slot.poller->timeouts, 1);
        return AP_ELATE;
    }
    ap_input_arm(conn, AP_WANT_SESSION, until_pause, deadline);
    return -EAGAIN;
}

int ap_conn_shake(ap_conn *conn, int until_pause, int64_t deadline)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    rc = wait(conn, until_pause != 0, deadline);
    ap_slot_unlock(&conn->slot);
    return rc;
}
