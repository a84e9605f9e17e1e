# A package with a compiled part, from a directory, into an environment of its own.
rm -rf /tmp/pip && mkdir -p /tmp/pip/src /tmp/pip/wheels
cd /tmp/pip/src
cat >setup.py <<'end'
from setuptools import Extension, setup
setup(name="tried", version="1.0", py_modules=["tried"], ext_modules=[Extension("tried_c", ["tried.c"], py_limited_api=False)],
      entry_points={"console_scripts": ["tried = tried:main"]})
end
cat >tried.py <<'end'
import tried_c
def main(): print("tried", tried_c.answer())
end
cat >tried.c <<'end'
#include <Python.h>
static PyObject *answer(PyObject *s, PyObject *a) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tried_c", "", -1, methods};
PyMODINIT_FUNC PyInit_tried_c(void) { return PyModule_Create(&module); }
end
python3 -m venv --system-site-packages /tmp/pip/venv
/tmp/pip/venv/bin/pip install --no-index --no-build-isolation --disable-pip-version-check . >/tmp/pip/log 2>&1 || { cat /tmp/pip/log; exit 1; }
/tmp/pip/venv/bin/tried | grep '^tried 42$'
