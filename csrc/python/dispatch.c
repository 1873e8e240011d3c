/* Waking those whose wait is over: the tokens of the mailbox, one after another.
 *
 * On asyncio a woken task runs at once, within dispatch(), in the task's own context: the event
 * loop's scheduler is not asked, which would cost a microsecond. On Trio it is rescheduled. Both
 * are for tokens only: what user code causes (a close) wakes in the next round, or user code would
 * run in the middle of other user code.
 *
 * One call of dispatch() wakes a bounded number of tasks, then lets the loop have its turn. What a
 * woken task does to the others in the batch is harmless: each holds on to its operation, and looks
 * at its connection again.
 */
#include "native.h"

#define TURN 256 /* tasks woken before the loop gets its turn */
#define LAST (AP_MAIL_IDLE | AP_MAIL_STARVED | AP_MAIL_FAILED) /* may run user code */

typedef struct {
    walk walk;
    Hub *hub;
    Operation *ready[BATCH];
    ap_token other[BATCH];
    int ready_count, other_count, woken;
    bool trim, more;
    bool nested;    /* dispatch() was called by a task: tasks cannot run within one another */
    PyObject *left; /* a list of the exceptions that end the program, or NULL */
} batch;

void hub_keep_exception(PyObject **left)
{
    PyObject *value = native_take_exception();
    if (!*left)
        *left = PyList_New(0);
    if (!*left || PyList_Append(*left, value) < 0)
        PyErr_Clear();
    Py_XDECREF(value);
}

int hub_raise_first(Hub *hub, PyObject *left)
{
    if (!left)
        return 0;
    PyObject *none = PyObject_CallMethodObjArgs((PyObject *)hub, n__raise_first, left, NULL);
    Py_DECREF(left);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* Its step is taken when all tokens have been told. */
static bool make_ready(batch *b, Core *core)
{
    PyObject *found = core->requests;
    bool in_request_mode = found && PyObject_TypeCheck(found, Requests_Type);
    Requests *requests = in_request_mode ? hub_take_idle((Requests *)found) : NULL;
    if (requests && requests_submit(requests) < 0)
        hub_keep_exception(&b->left);
    Py_XDECREF((PyObject *)requests);
    return requests != NULL;
}

static void end_wait(batch *b, Core *core, ap_token *token)
{
    Operation *op = hub_take_wait(core);
    if (op) {
        /* of a failure the value is the error, not the window's end */
        operation_ready(op, token->bits & AP_MAIL_FAILED ? 0 : token->value);
        b->ready[b->ready_count++] = op;
    }
    if (op || make_ready(b, core))
        token->bits &= ~(uint32_t)AP_MAIL_READ;
}

/* Lets go of what the core no longer refers to. This comes before anybody is told anything, for
 * whoever runs then may send more, which is kept in the same place. */
static void forget_sent(Hub *hub, const ap_token *tokens, int n)
{
    for (int i = 0; i < n && hub->outputs; i++) {
        if (!(tokens[i].bits & AP_MAIL_SENT))
            continue;
        PyObject *number = PyLong_FromUnsignedLongLong(tokens[i].id);
        if (!number || PyDict_DelItem(hub->outputs, number) < 0)
            PyErr_Clear(); /* nothing was kept */
        Py_XDECREF(number);
    }
}

static void sort(batch *b, const ap_token *token)
{
    ap_token rest = *token;
    rest.bits &= ~(uint32_t)AP_MAIL_SENT;
    b->trim |= (token->bits & AP_MAIL_TRIM) != 0;
    Core *core = token->bits & AP_MAIL_READ ? hub_find(b->hub, token->id) : NULL;
    if (core)
        end_wait(b, core, &rest);
    b->more |= (rest.bits & ~(uint32_t)AP_MAIL_TRIM) != 0;
    if (rest.bits)
        b->other[b->other_count++] = rest;
}

static void tell(batch *b, const ap_token *token, uint32_t bits, PyObject *method)
{
    if (!bits)
        return;
    PyObject *id = PyLong_FromUnsignedLongLong(token->id), *what = PyLong_FromLong((long)bits);
    PyObject *value = PyLong_FromLong(token->value), *none = NULL;
    if (id && what && value)
        none = PyObject_CallMethodObjArgs((PyObject *)b->hub, method, id, what, value, NULL);
    if (!none)
        hub_keep_exception(&b->left);
    Py_XDECREF(none);
    Py_XDECREF(id);
    Py_XDECREF(what);
    Py_XDECREF(value);
}

/* Before any handler runs: one that cancels such a task would have Trio reschedule it too, which
 * must not happen twice. */
static void reschedule_tasks(batch *b)
{
    for (int i = 0; i < b->ready_count; i++) {
        Operation *op = b->ready[i];
        if (op->wake && Py_TYPE(op->wake) != Drive_Type && operation_wake(op) < 0)
            hub_keep_exception(&b->left);
    }
}

/* Wakes tasks until it comes to a handler that goes on here. */
static Drive *next_ready(walk *walk)
{
    batch *b = (batch *)walk;
    while (b->woken < b->ready_count) {
        Operation *op = b->ready[b->woken++];
        bool driven = op->wake && Py_TYPE(op->wake) == Drive_Type && !b->nested;
        Drive *drive = driven ? (Drive *)Py_NewRef(op->wake) : NULL;
        if (!driven && (b->nested ? operation_wake_soon(op) : operation_wake(op)) < 0)
            hub_keep_exception(&b->left);
        Py_DECREF((PyObject *)op);
        if (driven)
            return drive;
    }
    return NULL;
}

static void deliver(batch *b)
{
    for (int i = 0; i < b->other_count; i++)
        tell(b, &b->other[i], b->other[i].bits & ~(uint32_t)LAST, n_dispatch_one);
    if (b->hub->trio)
        reschedule_tasks(b);
    drive_walk(&b->walk);
    for (int i = 0; i < b->other_count; i++)
        tell(b, &b->other[i], b->other[i].bits & LAST, n__tell_last);
}

static int is_nested(Hub *hub)
{
    if (hub->trio) /* there it is a task that dispatches */
        return false;
    PyObject *task = hub_current_task(hub);
    if (!task) {
        PyErr_Clear();
        return true;
    }
    Py_DECREF(task);
    return task != Py_None;
}

int hub_deliver(Hub *hub, ap_token *tokens, int n, bool nested)
{
    batch b; /* not all of it: it is large, and mostly one task is woken */
    b.walk = (walk){.hub = hub, .next = next_ready, .left = &b.left};
    b.hub = hub;
    b.nested = nested;
    b.trim = b.more = false;
    b.left = NULL;
    hub->depth++;
    int woken = 0;
    uint32_t before = hub->jobs;
    while (n > 0) {
        b.ready_count = b.other_count = b.woken = 0;
        forget_sent(hub, tokens, n);
        for (int i = 0; i < n; i++)
            sort(&b, &tokens[i]);
        deliver(&b);
        woken += b.ready_count;
        if (n < BATCH)
            break;
        if (woken >= TURN) {
            ap_hub_again(hub->hub);
            b.more = true;
            break;
        }
        n = ap_hub_take(hub->hub, tokens, BATCH);
    }
    if (!nested)
        workers_run_due(hub, &b.left);
    woken += (int)(hub->jobs - before);
    hub->round_due |= hub->due != NULL;
    hub->depth--;
    if (b.trim) /* now that the wrappers of the blocks are gone */
        ap_hub_trim(hub->hub);
    hub_go_round(hub, nested || hub->depth > 0 ? 0 : TURN - woken, &b.left);
    return hub_raise_first(hub, b.left) < 0 ? -1 : b.more;
}

PyObject *hub_dispatch(PyObject *self, PyObject *unused)
{
    Hub *hub = (Hub *)self;
    ap_token tokens[BATCH];
    if (hub_check_attached(hub) < 0)
        return NULL;
    int n = ap_hub_take(hub->hub, tokens, BATCH);
    if (n > 0 && hub_deliver(hub, tokens, n, is_nested(hub)) < 0)
        return NULL;
    Py_RETURN_NONE;
}
