// Turns the C++ exception in flight into a Python one. The GIL is held.
#pragma once
#include <Python.h>

#include <new>

#include "core/error.h"

namespace ferrum {

/// Class of each ErrorKind, set once when the module is made.
inline PyObject* error_classes[static_cast<int>(ErrorKind::Device) + 1] = {};

inline void set_error_class(int kind, PyObject* cls) {
  Py_INCREF(cls);
  error_classes[kind] = cls;
}

inline void raise_current_error() {
  if (PyErr_Occurred()) return;  // a signal handler raised while the core asked whether to stop
  try {
    throw;
  } catch (const Error& error) {
    PyErr_SetString(error_classes[static_cast<int>(error.kind)], error.what());
  } catch (const std::bad_alloc&) {
    PyErr_SetString(error_classes[static_cast<int>(ErrorKind::OutOfMemory)], "the system refused memory. Lower kv_tokens, max_sequences or prefill_chunk.");
  } catch (const std::exception& error) {
    PyErr_SetString(error_classes[static_cast<int>(ErrorKind::Device)], error.what());
  }
}

/// Runs pending Python signal handlers; true if one raised, so that the core stops and the exception goes on. For the main thread only: no
/// other runs handlers, and at the interpreter's end asking for the GIL would end a thread inside the core.
inline bool python_wants_stop() {
  PyGILState_STATE state = PyGILState_Ensure();
  const bool stop = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  return stop;
}

inline bool never_stop() { return false; }

}  // namespace ferrum
