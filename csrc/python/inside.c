/* What is used of others' inside on every request: attributes of Trio's and AnyIO's objects, and
 * the contexts of CPython.
 *
 * Those attributes are slots of their classes, and the loops' hubs have looked up the descriptors
 * (_loop/trio_hub.py, asyncio_hub.py). All descriptors of slots are of one type, so its functions
 * are looked up once. The search for a name would take longer than all else.
 *
 * PyContext_Enter() is public, but not in the limited API. Context.run(), which is, needs a call of
 * a Python object within a call of a method. So the function is looked up by its name.
 */
#include "native.h"

#include <dlfcn.h>

static descrgetfunc get;
static descrsetfunc set;

int (*enter_context)(PyObject *context);
int (*exit_context)(PyObject *context);

int inside_init(void)
{
    PyObject *member = PyObject_GetAttrString((PyObject *)Reader_Type, "_start");
    if (!member)
        return -1;
    get = (descrgetfunc)PyType_GetSlot(Py_TYPE(member), Py_tp_descr_get);
    set = (descrsetfunc)PyType_GetSlot(Py_TYPE(member), Py_tp_descr_set);
    Py_DECREF(member);
    /* ISO C has no conversion from an object's pointer to a function's; POSIX has. */
    *(void **)&enter_context = dlsym(RTLD_DEFAULT, "PyContext_Enter");
    *(void **)&exit_context = dlsym(RTLD_DEFAULT, "PyContext_Exit");
    if (enter_context && exit_context)
        return 0;
    PyErr_SetString(PyExc_ImportError, "PyContext_Enter() is hidden");
    return -1;
}

PyObject *slot_get(Hub *hub, PyObject *object, int slot)
{
    PyObject *descriptor = PyTuple_GetItem(hub->slots, slot);
    return descriptor ? get(descriptor, object, NULL) : NULL;
}

int slot_set(Hub *hub, PyObject *object, int slot, PyObject *value)
{
    PyObject *descriptor = PyTuple_GetItem(hub->slots, slot);
    return descriptor ? set(descriptor, object, value) : -1;
}

bool slot_is_true(Hub *hub, PyObject *object, int slot)
{
    PyObject *value = slot_get(hub, object, slot);
    bool truth = value == Py_True;
    Py_XDECREF(value);
    return truth;
}
