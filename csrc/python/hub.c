/* Who waits for input in one event loop, and how they are woken.
 *
 * A core with an armed operation is in a list of its hub, which holds both strongly: the operation
 * holds the wake-up of its task, so nothing else need hold the task. The garbage collector sees
 * the list, so a forgotten event loop can be collected with all that waits in it. A core is found
 * by the number of its slot, and its generation is compared: a token of an earlier occupant finds
 * nothing.
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

PyTypeObject *Hub_Type;

/* ---- the cores by number ------------------------------------------------ */

int hub_add_core(Hub *hub, Core *core)
{
    uint32_t index = (uint32_t)core->number;
    if (index >= hub->room) {
        uint32_t room = hub->room ? hub->room : 64;
        while (room <= index)
            room *= 2;
        Core **cores = PyMem_Realloc(hub->cores, room * sizeof *cores);
        if (!cores) {
            PyErr_NoMemory();
            return -1;
        }
        memset(cores + hub->room, 0, (room - hub->room) * sizeof *cores);
        hub->cores = cores;
        hub->room = room;
    }
    hub->cores[index] = core;
    return 0;
}

void hub_remove_core(Hub *hub, Core *core)
{
    uint32_t index = (uint32_t)core->number;
    if (index < hub->room && hub->cores[index] == core)
        hub->cores[index] = NULL;
}

static Core *find(Hub *hub, unsigned long long number)
{
    uint32_t index = (uint32_t)number;
    Core *core = index < hub->room ? hub->cores[index] : NULL;
    return core && core->number == number ? core : NULL;
}

/* ---- the list of those that wait ---------------------------------------- */

void hub_wait(Core *core, Operation *op)
{
    Hub *hub = core->hub;
    core->waiting = (Operation *)Py_NewRef((PyObject *)op);
    Py_INCREF((PyObject *)core);
    core->prev = NULL;
    core->next = hub->waiting;
    if (core->next)
        core->next->prev = core;
    hub->waiting = core;
    hub->armed++;
}

Operation *hub_take_wait(Core *core)
{
    Operation *op = core->waiting;
    if (!op)
        return NULL;
    core->waiting = NULL;
    core->hub->armed--;
    if (core->prev)
        core->prev->next = core->next;
    else
        core->hub->waiting = core->next;
    if (core->next)
        core->next->prev = core->prev;
    core->next = core->prev = NULL;
    Py_DECREF((PyObject *)core); /* the operation holds it too */
    return op;
}

void hub_forget_wait(Core *core)
{
    Operation *op = hub_take_wait(core);
    Py_XDECREF((PyObject *)op);
}

/* ---- the loop ------------------------------------------------------------ */

int hub_check(Hub *hub)
{
    bool here = hub->thread == PyThread_get_thread_ident();
    if (here && (hub->trio || hub->depth > 0)) /* a thread has one Trio run at a time */
        return 0;
    if (here && hub->loop) {
        PyObject *running = PyObject_CallNoArgs(running_loop);
        if (!running)
            return -1;
        bool same = running == PyWeakref_GetObject(hub->loop);
        Py_DECREF(running);
        if (same)
            return 0;
    }
    PyObject *none = PyObject_CallMethodObjArgs((PyObject *)hub, n_check, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

PyObject *hub_loop(Hub *hub)
{
    PyObject *loop = hub && hub->loop ? PyWeakref_GetObject(hub->loop) : NULL;
    return Py_NewRef(loop ? loop : Py_None);
}

static PyObject *call_soon_within(PyObject *loop, PyObject *callback, PyObject *argument,
                                  PyObject *context)
{
    PyObject *method = PyObject_GetAttr(loop, n_call_soon), *handle = NULL;
    PyObject *args = method ? PyTuple_Pack(2, callback, argument) : NULL;
    PyObject *kwargs = args ? PyDict_New() : NULL;
    if (kwargs && PyDict_SetItem(kwargs, n_context, context) == 0)
        handle = PyObject_Call(method, args, kwargs);
    Py_XDECREF(method);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return handle;
}

int hub_check_attached(Hub *hub)
{
    if (hub->hub && hub->current_task)
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "this hub is not initialised");
    return -1;
}

/* asyncio's dict has the task of each loop, Trio's the one of this thread's run. To look there
 * costs less than the loop's function, which on asyncio is interpreted up to CPython 3.11. */
PyObject *hub_current_task(Hub *hub)
{
    if (!hub->tasks || !PyDict_CheckExact(hub->tasks)) {
        if (hub_check_attached(hub) < 0)
            return NULL;
        return PyObject_CallNoArgs(hub->current_task);
    }
    PyObject *loop = hub->trio ? Py_NewRef(n_task) : hub_loop(hub);
    PyObject *task = PyDict_GetItemWithError(hub->tasks, loop);
    Py_DECREF(loop);
    if (task)
        return Py_NewRef(task);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

bool hub_is_current_task(Hub *hub, PyObject *task)
{
    PyObject *current = hub_current_task(hub);
    if (!current)
        PyErr_Clear(); /* no task is running */
    Py_XDECREF(current);
    return current == task;
}

int hub_call_soon(Hub *hub, PyObject *callback, PyObject *argument, PyObject *context)
{
    PyObject *loop = hub_loop(hub), *handle = NULL;
    bool lost = loop == Py_None; /* nobody will run the task any more */
    if (!lost && context)
        handle = call_soon_within(loop, callback, argument, context);
    else if (!lost)
        handle = PyObject_CallMethodObjArgs(loop, n_call_soon, callback, argument, NULL);
    Py_DECREF(loop);
    Py_XDECREF(handle);
    return handle || lost ? 0 : -1;
}

PyObject *hub_trap(Hub *hub, Operation *op)
{
    Core *core = op->core;
    if (hub_check(hub) < 0)
        return NULL;
    op->wake = hub_current_task(hub);
    if (!op->wake)
        return NULL;
    if (!core->trap) {
        PyObject *number = PyLong_FromUnsignedLongLong(core->number);
        core->trap =
            number ? PyObject_CallMethodObjArgs((PyObject *)hub, n__trap, number, NULL) : NULL;
        Py_XDECREF(number);
    }
    return Py_XNewRef(core->trap);
}

/* ---- dispatch ----------------------------------------------------------- */

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

static void sort(batch *b, const ap_token *token)
{
    ap_token rest = *token;
    b->trim |= (token->bits & AP_MAIL_TRIM) != 0;
    Core *core = token->bits & AP_MAIL_READ ? find(b->hub, token->id) : NULL;
    if (core)
        end_wait(b, core, &rest);
    b->more |= (rest.bits & ~(uint32_t)(AP_MAIL_SENT | AP_MAIL_TRIM)) != 0;
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

static PyObject *dispatch(PyObject *self, PyObject *unused)
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

/* ---- for Python --------------------------------------------------------- */

static PyObject *waits(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = find((Hub *)self, id);
    return PyBool_FromLong(core && core->waiting);
}

static PyObject *wake_waiting(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = find((Hub *)self, id);
    Operation *op = core ? hub_take_wait(core) : NULL;
    if (!op)
        Py_RETURN_FALSE;
    operation_ready(op, 0);
    int rc = operation_wake_soon(op);
    Py_DECREF((PyObject *)op);
    if (rc < 0)
        return NULL;
    Py_RETURN_TRUE;
}

/* One that is being deallocated is no longer to be found. */
static PyObject *find_core(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = find((Hub *)self, id);
    return Py_NewRef(core && Py_REFCNT((PyObject *)core) > 0 ? (PyObject *)core : Py_None);
}

static PyObject *all_cores(PyObject *self, PyObject *unused)
{
    Hub *hub = (Hub *)self;
    PyObject *list = PyList_New(0);
    for (uint32_t i = 0; list && i < hub->room; i++) {
        PyObject *core = (PyObject *)hub->cores[i];
        if (core && Py_REFCNT(core) > 0 && PyList_Append(list, core) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *remove_core(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = find((Hub *)self, id);
    if (core)
        hub_remove_core((Hub *)self, core);
    Py_RETURN_NONE;
}

static PyObject *forget_waiting(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = find((Hub *)self, id);
    if (core)
        hub_forget_wait(core);
    Py_RETURN_NONE;
}

static void forget_idle(Hub *hub)
{
    while (hub->idle)
        Py_DECREF((PyObject *)hub_take_idle(hub->idle));
}

static PyObject *clear_waiting(PyObject *self, PyObject *unused)
{
    Hub *hub = (Hub *)self;
    while (hub->waiting)
        hub_forget_wait(hub->waiting);
    forget_idle(hub);
    hub_stop_resting(hub);
    Py_RETURN_NONE;
}

static PyObject *stop_resting(PyObject *self, PyObject *unused)
{
    hub_stop_resting((Hub *)self);
    Py_RETURN_NONE;
}

static PyObject *attach(PyObject *self, PyObject *address)
{
    Hub *hub = (Hub *)self;
    hub->hub = PyLong_AsVoidPtr(address);
    hub->thread = PyThread_get_thread_ident();
    if (PyErr_Occurred())
        return NULL;
    if (!hub->stepper && !(hub->stepper = PyObject_GetAttr(self, n__step_on)))
        return NULL;
    Py_RETURN_NONE;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Hub *hub = (Hub *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(hub->loop);
    Py_VISIT(hub->outputs);
    Py_VISIT(hub->current_task);
    Py_VISIT(hub->tasks);
    Py_VISIT(hub->abort_succeeded);
    Py_VISIT(hub->abort_failed);
    Py_VISIT(hub->wait_trap);
    Py_VISIT(hub->runner);
    Py_VISIT(hub->slots);
    Py_VISIT(hub->instruments);
    Py_VISIT(hub->unprotected);
    Py_VISIT(hub->stepper);
    Py_VISIT(hub->entered);
    Py_VISIT(hub->look);
    Py_VISIT(hub->states);
    Py_VISIT(hub->shielded);
    Py_VISIT(hub->reschedule);
    Py_VISIT(hub->value);
    Py_VISIT(hub->queue);
    Py_VISIT(hub->frame);
    for (Core *core = hub->waiting; core; core = core->next) {
        Py_VISIT((PyObject *)core);
        Py_VISIT((PyObject *)core->waiting);
    }
    for (Drive *drive = hub->resting; drive; drive = drive->next)
        Py_VISIT((PyObject *)drive);
    for (Requests *requests = hub->idle; requests; requests = requests->next)
        Py_VISIT((PyObject *)requests);
    for (Workers *pool = hub->due; pool; pool = pool->next_due)
        Py_VISIT((PyObject *)pool);
    Py_VISIT(hub->rester);
    return 0;
}

static int clear(PyObject *self)
{
    Hub *hub = (Hub *)self;
    while (hub->waiting)
        hub_forget_wait(hub->waiting);
    while (hub->resting)
        hub_end_rest(hub->resting);
    forget_idle(hub);
    for (Workers *pool; (pool = workers_take_due(hub));)
        Py_DECREF((PyObject *)pool);
    Py_CLEAR(hub->rester);
    Py_CLEAR(hub->loop);
    Py_CLEAR(hub->outputs);
    Py_CLEAR(hub->current_task);
    Py_CLEAR(hub->tasks);
    Py_CLEAR(hub->abort_succeeded);
    Py_CLEAR(hub->abort_failed);
    Py_CLEAR(hub->wait_trap);
    Py_CLEAR(hub->runner);
    Py_CLEAR(hub->slots);
    Py_CLEAR(hub->instruments);
    Py_CLEAR(hub->unprotected);
    Py_CLEAR(hub->stepper);
    Py_CLEAR(hub->entered);
    Py_CLEAR(hub->look);
    Py_CLEAR(hub->states);
    Py_CLEAR(hub->shielded);
    Py_CLEAR(hub->reschedule);
    Py_CLEAR(hub->value);
    Py_CLEAR(hub->queue);
    Py_CLEAR(hub->frame);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    PyMem_Free(((Hub *)self)->cores);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"_attach", attach, METH_O, "Takes the address of the core's hub; in the loop's thread."},
    {"dispatch", dispatch, METH_NOARGS,
     "Takes the mailbox and wakes the waiters named in it. Call it in the loop's thread.\n\n"
     "Events that may run user code come last: the other tokens describe the moment they were\n"
     "taken, and user code may use their connections. An exception that ends the program leaves\n"
     "this method once every token has been delivered."},
    {"drive", hub_drive, METH_O,
     "Does what there is to do for the poller that is lent to this hub, and dispatches. The loop\n"
     "calls it, outside of any task."},
    {"_step_on", drive_step_on, METH_NOARGS, "Steps handlers, in the frame that calls this."},
    {"_core", find_core, METH_O, "The open connection's core of that number, or None."},
    {"_cores", all_cores, METH_NOARGS, "The cores of all open connections."},
    {"_remove_core", remove_core, METH_O, "The core of that number is found no longer."},
    {"waits", waits, METH_O, "Whether a reader call of the connection of that number waits."},
    {"_wake_waiting", wake_waiting, METH_O,
     "Ends the wait of that number in the next round; returns whether there is one."},
    {"_forget_waiting", forget_waiting, METH_O,
     "The wait of that number is over for other reasons."},
    {"_resume_rested", hub_resume_rested, METH_O,
     "Resumes the handlers whose round this is; returns whether another has been asked for."},
    {"_stop_resting", stop_resting, METH_NOARGS,
     "Handlers rest with their tasks from now on, and those that do now go on by them."},
    {"_clear_waiting", clear_waiting, METH_NOARGS, "Nobody will be woken any more."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"dead", T_BOOL, offsetof(Hub, dead), 0, NULL},
    {"_can_rest", T_BOOL, offsetof(Hub, can_rest), 0, NULL},
    {"_rester", T_OBJECT, offsetof(Hub, rester), 0, NULL},
    {"_is_trio", T_BOOL, offsetof(Hub, trio), 0, NULL},
    {"_loop", T_OBJECT, offsetof(Hub, loop), 0, NULL},
    {"outputs", T_OBJECT, offsetof(Hub, outputs), 0, NULL},
    {"_runner", T_OBJECT, offsetof(Hub, runner), 0, NULL},
    {"_slots", T_OBJECT, offsetof(Hub, slots), 0, NULL},
    {"_instruments", T_OBJECT, offsetof(Hub, instruments), 0, NULL},
    {"_unprotected", T_OBJECT, offsetof(Hub, unprotected), 0, NULL},
    {"_wait_trap", T_OBJECT, offsetof(Hub, wait_trap), 0, NULL},
    {"_abort_succeeded", T_OBJECT, offsetof(Hub, abort_succeeded), 0, NULL},
    {"_abort_failed", T_OBJECT, offsetof(Hub, abort_failed), 0, NULL},
    {"_current_task", T_OBJECT, offsetof(Hub, current_task), 0, NULL},
    {"_tasks", T_OBJECT, offsetof(Hub, tasks), 0, NULL},
    {"_states", T_OBJECT, offsetof(Hub, states), 0, NULL},
    {"_look", T_OBJECT, offsetof(Hub, look), 0, NULL},
    {"_shielded", T_OBJECT, offsetof(Hub, shielded), 0, NULL},
    {"_reschedule", T_OBJECT, offsetof(Hub, reschedule), 0, NULL},
    {"_queue", T_OBJECT, offsetof(Hub, queue), 0, NULL},
    {"_frame", T_OBJECT, offsetof(Hub, frame), 0, NULL},
    {"_value", T_OBJECT, offsetof(Hub, value), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a hub."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec Hub_spec = {
    .name = "anypoll._native.Hub",
    .basicsize = sizeof(Hub),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
