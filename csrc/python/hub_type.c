/* The hub as a type: its methods and members, and what it keeps alive. */
#include "native.h"

PyTypeObject *Hub_Type;

static PyObject *waits(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = hub_find((Hub *)self, id);
    return PyBool_FromLong(core && core->waiting);
}

static PyObject *wake_waiting(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = hub_find((Hub *)self, id);
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
    Core *core = hub_find((Hub *)self, id);
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
    Core *core = hub_find((Hub *)self, id);
    if (core)
        hub_remove_core((Hub *)self, core);
    Py_RETURN_NONE;
}

static PyObject *forget_waiting(PyObject *self, PyObject *number)
{
    unsigned long long id = PyLong_AsUnsignedLongLongMask(number);
    if (PyErr_Occurred())
        return NULL;
    Core *core = hub_find((Hub *)self, id);
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
    {"dispatch", hub_dispatch, METH_NOARGS,
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
