/* The module of the native types. It lives in the same shared object as the core and its cffi glue,
 * whose state it shares (PEP 489, "Multiple modules in one library").
 */
#include "native.h"

#define DEFINE(name) PyObject *n_##name;
NAMES(DEFINE)
#undef DEFINE

PyObject *BusyResourceError, *EndOfStream, *CancelledError, *InvalidStateError;
PyObject *running_loop, *enter_task, *leave_task, *empty_bytes, *empty_view, *usual_most;
PyObject *coroutine_type;

extern PyType_Spec Block_spec, Reader_spec, Writer_spec, Core_spec, Hub_spec, Stream_spec,
    Operation_spec, Drive_spec, Requests_spec, Workers_spec;

static int intern_names(void)
{
#define INTERN(name)                                     \
    if (!(n_##name = PyUnicode_InternFromString(#name))) \
        return -1;
    NAMES(INTERN)
#undef INTERN
    return 0;
}

static PyObject *from(const char *module, const char *name)
{
    PyObject *imported = PyImport_ImportModule(module);
    PyObject *found = imported ? PyObject_GetAttrString(imported, name) : NULL;
    Py_XDECREF(imported);
    return found;
}

static int import_objects(void)
{
    empty_bytes = PyBytes_FromStringAndSize(NULL, 0);
    empty_view = empty_bytes ? PyMemoryView_FromObject(empty_bytes) : NULL;
    usual_most = PyLong_FromLong(65536);
    return empty_view && usual_most && (BusyResourceError = from("anyio", "BusyResourceError")) &&
                   (EndOfStream = from("anyio", "EndOfStream")) &&
                   (CancelledError = from("asyncio", "CancelledError")) &&
                   (InvalidStateError = from("asyncio", "InvalidStateError")) &&
                   (running_loop = from("asyncio", "_get_running_loop")) &&
                   (enter_task = from("asyncio.tasks", "_enter_task")) &&
                   (leave_task = from("asyncio.tasks", "_leave_task")) &&
                   (coroutine_type = from("types", "CoroutineType"))
               ? 0
               : -1;
}

static int add_type(PyObject *module, const char *name, PyType_Spec *spec, PyTypeObject **type)
{
    PyObject *made = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!made)
        return -1;
    *type = (PyTypeObject *)made;
    return PyModule_AddObjectRef(module, name, made);
}

static int execute(PyObject *module)
{
    static bool done; /* what is here is the process's, as the core is */
    if (done) {
        PyErr_SetString(PyExc_ImportError, "anypoll works in one interpreter only");
        return -1;
    }
    done = true;
    if (intern_names() < 0 || import_objects() < 0 ||
        PyModule_AddObjectRef(module, "EMPTY", empty_view) < 0)
        return -1;
    return add_type(module, "Block", &Block_spec, &Block_Type) < 0 ||
                   add_type(module, "Reader", &Reader_spec, &Reader_Type) < 0 ||
                   add_type(module, "Writer", &Writer_spec, &Writer_Type) < 0 ||
                   add_type(module, "Hub", &Hub_spec, &Hub_Type) < 0 ||
                   add_type(module, "Core", &Core_spec, &Core_Type) < 0 ||
                   add_type(module, "Stream", &Stream_spec, &Stream_Type) < 0 ||
                   add_type(module, "Operation", &Operation_spec, &Operation_Type) < 0 ||
                   add_type(module, "Drive", &Drive_spec, &Drive_Type) < 0 ||
                   add_type(module, "Workers", &Workers_spec, &Workers_Type) < 0 ||
                   add_type(module, "Requests", &Requests_spec, &Requests_Type) < 0 ||
                   inside_init() < 0
               ? -1
               : 0;
}

static PyObject *gather(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    Py_ssize_t most = n == 2 ? PyLong_AsSsize_t(args[1]) : -1;
    if (PyErr_Occurred())
        return NULL;
    if (most < 0 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "gather() takes a list, and a number of bytes");
        return NULL;
    }
    return writer_gather(args[0], most);
}

static PyMethodDef methods[] = {
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL,
     "gather(pieces, most, /)\n--\n\n"
     "The pieces as a list, with small ``bytes`` joined into pieces of up to ``most`` bytes."},
    {"register", core_register_all, METH_O,
     "register(cores, /)\n--\n\n"
     "Has the connections watched; returns 0 or a negative errno for each."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "anypoll._native._types",
    .m_doc = "The native types of the hot path.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__types(void)
{
    return PyModuleDef_Init(&definition);
}
