/* Who waits for input in one event loop, and the loop itself.
 *
 * A core with an armed operation is in a list of its hub, which holds both strongly: the operation
 * holds the wake-up of its task, so nothing else need hold the task. The garbage collector sees
 * the list, so a forgotten event loop can be collected with all that waits in it. A core is found
 * by the number of its slot, and its generation is compared: a token of an earlier occupant finds
 * nothing.
 *
 * dispatch.c wakes those that wait; hub_type.c is what Python sees.
 */
#include "native.h"

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

Core *hub_find(Hub *hub, unsigned long long number)
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
