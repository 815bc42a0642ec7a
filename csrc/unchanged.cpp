// Whether modules, classes and what code finds by name are what they were: engine/unchanged.py says what is looked at, and
// asks the same in Python where there is no library.
//
// A few thousand objects, nearly all of them the very ones that were there before: so first whether any of their dictionaries
// was written to at all, as Python keeps count of; then identities, of the entries of two dictionaries side by side, and `==`
// where these differ. That may run anything and change what is being walked: what it is given is held meanwhile, `PyDict_Next`
// and `PyList_Size` look at what is there each time.
#include <Python.h>

#include <cstdint>
#include <exception>

namespace vf {
namespace {

// 1, 0 or -1 with an exception, as of PyObject_RichCompareBool.
using Answer = int;

// Owns a reference.
struct Owned {
  explicit Owned(PyObject* o) : object(o) {}
  ~Owned() { Py_XDECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* const object;
};

Owned held(PyObject* borrowed) {
  Py_XINCREF(borrowed);
  return Owned(borrowed);
}

Answer same_entries(PyObject* now, PyObject* were);

// Whose `==` with a dict is that of its entries, in any order.
bool compares_entries(PyObject* o) { return PyDict_CheckExact(o) || PyODict_CheckExact(o); }

Answer same(PyObject* now, PyObject* was) {
  if (now == was) return 1;
  const Owned first = held(now), second = held(was);
  if (!PyDict_CheckExact(was) || !compares_entries(now)) return PyObject_RichCompareBool(now, was, Py_EQ);
  if (Py_EnterRecursiveCall(" in comparing attributes")) return -1;
  const Answer answer = same_entries(now, was);
  Py_LeaveRecursiveCall();
  return answer;
}

// Whether `name: was` is in `now`, of which the walk is at `at` as long as both are `in_step`: entries are mostly in the
// order that they were in.
inline Answer has(PyObject* now, Py_ssize_t& at, bool& in_step, PyObject* name, PyObject* was) {
  PyObject *other, *value;
  in_step = in_step && PyDict_Next(now, &at, &other, &value) && other == name;
  if (in_step && value == was) return 1;
  const Owned first = held(name), second = held(was);
  if (!in_step) {
    value = PyDict_GetItemWithError(now, name);
    if (value == nullptr) return PyErr_Occurred() ? -1 : 0;
  }
  return same(value, was);
}

// `now == were`.
Answer same_entries(PyObject* now, PyObject* were) {
  if (PyDict_Size(now) != PyDict_Size(were)) return 0;
  Py_ssize_t at = 0, place = 0;
  PyObject *name, *was;
  bool in_step = true;
  while (PyDict_Next(were, &place, &name, &was)) {
    const Answer answer = has(now, at, in_step, name, was);
    if (answer != 1) return answer;
  }
  return 1;
}

// The same of the tuple (name, value, name, ...), half as long on the way.
Answer same_as_listed(PyObject* now, PyObject* entries) {
  const Py_ssize_t size = PyTuple_GET_SIZE(entries);
  if (2 * PyDict_Size(now) != size) return 0;
  Py_ssize_t at = 0;
  bool in_step = true;
  for (Py_ssize_t i = 0; i + 1 < size; i += 2) {
    const Answer answer = has(now, at, in_step, PyTuple_GET_ITEM(entries, i), PyTuple_GET_ITEM(entries, i + 1));
    if (answer != 1) return answer;
  }
  return 1;
}

Owned dict_of_class(PyObject* kind) {
#if PY_VERSION_HEX >= 0x030C0000
  return Owned(PyType_GetDict(reinterpret_cast<PyTypeObject*>(kind)));
#else
  return held(reinterpret_cast<PyTypeObject*>(kind)->tp_dict);
#endif
}

Answer same_class(PyObject* kind, PyObject* were) { return same_entries(dict_of_class(kind).object, were); }

PyObject* wrong(const char* message) {
  PyErr_SetString(PyExc_TypeError, message);
  return nullptr;
}

PyObject* answered(Answer answer) { return answer < 0 ? nullptr : PyBool_FromLong(answer); }

// --- modules and classes ---------------------------------------------------------------------------------------------

Answer all_empty(PyObject* dicts) {
  for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
    PyObject* o = PyList_GET_ITEM(dicts, i);
    if (compares_entries(o)) {
      if (PyDict_GET_SIZE(o)) return 0;
      continue;
    }
    const Owned one = held(o);
    const Answer filled = PyObject_IsTrue(o);
    if (filled) return filled < 0 ? -1 : 0;
  }
  return 1;
}

Answer all_as_they_were(PyObject* modules, PyObject* kinds, PyObject* entries) {
  for (Py_ssize_t i = 0; i < PyList_Size(modules); ++i) {
    PyObject* module = PyList_GET_ITEM(modules, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyList_GET_ITEM(kinds, i)) return 0;
    const Owned own(PyObject_GenericGetDict(module, nullptr));
    if (own.object == nullptr) return -1;
    const Answer answer = same_as_listed(own.object, PyList_GET_ITEM(entries, i));
    if (answer != 1) return answer;
  }
  return 1;
}

// unchanged(modules, kinds, were, entries, empty, classes, vars): of each module its class and attributes, of each class
// the same; `empty` are dictionaries that were. `were` is for Python, `entries` says the same.
PyObject* unchanged(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 7) return wrong("unchanged(modules, kinds, were, entries, empty, classes, vars)");
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!PyList_CheckExact(given[i])) return wrong("unchanged takes lists");
  PyObject *modules = given[0], *kinds = given[1], *entries = given[3], *empty = given[4], *classes = given[5];
  PyObject* vars = given[6];
  const Py_ssize_t size = PyList_Size(modules), of_classes = PyList_Size(classes);
  if (PyList_Size(kinds) != size || PyList_Size(entries) != size || PyList_Size(vars) != of_classes)
    return wrong("unchanged takes as many kinds and entries as modules, and as many vars as classes");
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!PyTuple_CheckExact(PyList_GET_ITEM(entries, i))) return wrong("entries are tuples");
  for (Py_ssize_t i = 0; i < of_classes; ++i)
    if (!PyType_Check(PyList_GET_ITEM(classes, i)) || !PyDict_CheckExact(PyList_GET_ITEM(vars, i)))
      return wrong("classes are types, and their vars dicts");
  Answer answer = all_empty(empty);
  if (answer == 1) answer = all_as_they_were(modules, kinds, entries);
  for (Py_ssize_t i = 0; answer == 1 && i < of_classes; ++i)
    answer = same_class(PyList_GET_ITEM(classes, i), PyList_GET_ITEM(vars, i));
  return answered(answer);
}

// --- dictionaries that were written to ---------------------------------------------------------------------------------

// PEP 509: another one with every write to any dictionary. From Python 3.13 on, attributes are written past it.
using Tag = std::uint64_t;
constexpr bool counted = PY_VERSION_HEX < 0x030D0000;

Tag tag_of([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

bool have_tags(PyObject* dicts, const Tag* tags, std::size_t count) {
  if (PyList_Size(dicts) != static_cast<Py_ssize_t>(count)) return false;
  for (std::size_t i = 0; i < count; ++i)
    if (tag_of(PyList_GET_ITEM(dicts, static_cast<Py_ssize_t>(i))) != tags[i]) return false;
  return true;
}

// noted(modules, classes): (dicts, tags): the dictionary of each module, those that lie in them and those of the classes, and
// bytes that tell later whether any was written to; None where Python does not keep count.
PyObject* noted(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || !PyList_CheckExact(given[0]) || !PyList_CheckExact(given[1]))
    return wrong("noted(modules, classes), two lists");
  if (!counted) Py_RETURN_NONE;
  const Owned dicts(PyList_New(0));
  if (dicts.object == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(given[0]); ++i) {
    const Owned own(PyObject_GenericGetDict(PyList_GET_ITEM(given[0], i), nullptr));
    if (own.object == nullptr || PyList_Append(dicts.object, own.object)) return nullptr;
  }
  for (Py_ssize_t i = 0, size = PyList_GET_SIZE(dicts.object); i < size; ++i) {
    Py_ssize_t at = 0;
    PyObject *name, *value;
    while (PyDict_Next(PyList_GET_ITEM(dicts.object, i), &at, &name, &value))
      if (PyDict_Check(value) && PyList_Append(dicts.object, value)) return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyList_Size(given[1]); ++i) {
    PyObject* kind = PyList_GET_ITEM(given[1], i);
    if (!PyType_Check(kind)) return wrong("noted takes classes");
    const Owned own = dict_of_class(kind);
    if (own.object == nullptr || PyList_Append(dicts.object, own.object)) return nullptr;
  }
  const Py_ssize_t size = PyList_GET_SIZE(dicts.object);
  const Owned kept(PyBytes_FromStringAndSize(nullptr, size * static_cast<Py_ssize_t>(sizeof(Tag))));
  if (kept.object == nullptr) return nullptr;
  const auto tags = reinterpret_cast<Tag*>(PyBytes_AS_STRING(kept.object));  // behind a head of whole words
  for (Py_ssize_t i = 0; i < size; ++i) tags[i] = tag_of(PyList_GET_ITEM(dicts.object, i));
  return PyTuple_Pack(2, dicts.object, kept.object);
}

// untouched(modules, kinds, was): whether each module is of its kind and has that very dictionary, and none was written to
// since `noted` gave `was`.
PyObject* untouched(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !PyList_CheckExact(given[0]) || !PyList_CheckExact(given[1]))
    return wrong("untouched(modules, kinds, was), two lists and what noted gave");
  if (given[2] == Py_None) Py_RETURN_FALSE;
  PyObject *modules = given[0], *kinds = given[1], *was = given[2];
  if (!PyTuple_CheckExact(was) || PyTuple_GET_SIZE(was) != 2 || !PyList_CheckExact(PyTuple_GET_ITEM(was, 0)) ||
      !PyBytes_CheckExact(PyTuple_GET_ITEM(was, 1)))
    return wrong("untouched takes what noted gave");
  PyObject *dicts = PyTuple_GET_ITEM(was, 0), *tags = PyTuple_GET_ITEM(was, 1);
  const Py_ssize_t size = PyList_Size(modules);
  if (PyList_Size(kinds) != size || PyList_Size(dicts) < size)
    return wrong("untouched takes a kind and a dictionary of each module");
  const auto first = reinterpret_cast<const Tag*>(PyBytes_AS_STRING(tags));
  if (!have_tags(dicts, first, static_cast<std::size_t>(PyBytes_GET_SIZE(tags)) / sizeof(Tag))) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* module = PyList_GET_ITEM(modules, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyList_GET_ITEM(kinds, i)) Py_RETURN_FALSE;
    const Owned own(PyObject_GenericGetDict(module, nullptr));
    if (own.object == nullptr) return nullptr;
    if (own.object != PyList_GET_ITEM(dicts, i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// --- what code finds by name -----------------------------------------------------------------------------------------

// in_place(((where, name, value), ...), kind): whether each `getattr(where, name, None) is value`; where None, of `kind`.
PyObject* in_place(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || !PyTuple_CheckExact(given[0])) return wrong("in_place(tuple, kind)");
  PyObject* found = given[0];
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(found); ++i) {
    PyObject* one = PyTuple_GET_ITEM(found, i);
    if (!PyTuple_CheckExact(one) || PyTuple_GET_SIZE(one) != 3) return wrong("in_place takes (where, name, value)");
    PyObject* where = PyTuple_GET_ITEM(one, 0);
    const Owned now(PyObject_GetAttr(where == Py_None ? given[1] : where, PyTuple_GET_ITEM(one, 1)));
    if (now.object == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return nullptr;
      PyErr_Clear();
    }
    if ((now.object ? now.object : Py_None) != PyTuple_GET_ITEM(one, 2)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// --- tensors ---------------------------------------------------------------------------------------------------------

// tensors_of(owners, held, names): what lies in the dictionaries `held`, without None, as a tuple; None where one of them is
// not the one that its owner (a module, the name of an attribute) has, or has other names, or others of them are None.
PyObject* tensors_of(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !PyList_CheckExact(given[0]) || !PyList_CheckExact(given[1]) || !PyList_CheckExact(given[2]))
    return wrong("tensors_of(owners, held, names), three lists");
  const Py_ssize_t size = PyList_Size(given[0]);
  if (PyList_Size(given[1]) != size || PyList_Size(given[2]) != size)
    return wrong("tensors_of takes lists of one length");
  const Owned found(PyList_New(0));
  if (found.object == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *owner = PyList_GET_ITEM(given[0], i), *names = PyList_GET_ITEM(given[2], i);
    PyObject* dict = PyList_GET_ITEM(given[1], i);
    if (!PyTuple_CheckExact(owner) || PyTuple_GET_SIZE(owner) != 2 || !PyTuple_CheckExact(names) || !PyDict_Check(dict))
      return wrong("tensors_of takes (module, name), a dict and a tuple of (name, whether it is None)");
    const Owned own(PyObject_GenericGetDict(PyTuple_GET_ITEM(owner, 0), nullptr));
    if (own.object == nullptr) return nullptr;
    PyObject* now = PyDict_GetItemWithError(own.object, PyTuple_GET_ITEM(owner, 1));
    if (now == nullptr && PyErr_Occurred()) return nullptr;
    if (now != dict || 2 * PyDict_Size(dict) != PyTuple_GET_SIZE(names)) Py_RETURN_NONE;
    Py_ssize_t at = 0, place = 0;
    PyObject *name, *value;
    while (PyDict_Next(dict, &at, &name, &value) && place + 1 < PyTuple_GET_SIZE(names)) {
      PyObject *was = PyTuple_GET_ITEM(names, place), *absent = PyTuple_GET_ITEM(names, place + 1);
      place += 2;
      if (name != was) {
        const Owned first = held(name), second = held(value);
        const Answer answer = PyObject_RichCompareBool(name, was, Py_EQ);
        if (answer < 0) return nullptr;
        if (!answer) Py_RETURN_NONE;
      }
      if ((value == Py_None) != (absent == Py_True)) Py_RETURN_NONE;
      if (value != Py_None && PyList_Append(found.object, value)) return nullptr;
    }
  }
  return PyList_AsTuple(found.object);
}

// lie_at(tensors, places, function): whether each tensor has its first element at its place. `function` is the address of
// torch's own, `void* (PyObject*)`.
PyObject* lie_at(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 3 || !PyTuple_CheckExact(given[0]) || !PyList_CheckExact(given[1]))
    return wrong("lie_at(tuple, list, int)");
  const Py_ssize_t size = PyTuple_GET_SIZE(given[0]);
  if (PyList_Size(given[1]) != size) Py_RETURN_FALSE;
  void* address = PyLong_AsVoidPtr(given[2]);
  if (address == nullptr) return PyErr_Occurred() ? nullptr : wrong("lie_at takes the address of a function");
  const auto place_of = reinterpret_cast<void* (*)(PyObject*)>(address);
  for (Py_ssize_t i = 0; i < size; ++i) {
    void* was = PyLong_AsVoidPtr(PyList_GET_ITEM(given[1], i));
    if (was == nullptr && PyErr_Occurred()) return nullptr;
    try {
      if (place_of(PyTuple_GET_ITEM(given[0], i)) != was) Py_RETURN_FALSE;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }
  Py_RETURN_TRUE;
}

template <class F>
PyCFunction function(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

}  // namespace

int bind_unchanged(PyObject* module) {
  static PyMethodDef methods[] = {
      {"unchanged", function(&unchanged), METH_FASTCALL,
       "unchanged(modules, kinds, were, entries, empty, classes, vars, /)\n--\n\nWhether each module is of its kind and has the attributes that it had,\n"
       "entries (name, value, name, ...) which `were` says too, "
       "each class has its vars, and dictionaries that were empty are. What comparing raises."},
      {"noted", function(&noted), METH_FASTCALL,
       "noted(modules, classes, /)\n--\n\n(dicts, tags): the dictionary of each module, those in them and those of the classes, and bytes that tell later whether any\n"
       "was written to; None where Python does not keep count."},
      {"untouched", function(&untouched), METH_FASTCALL,
       "untouched(modules, kinds, was, /)\n--\n\nWhether each module is of its kind and has that very dictionary, and none was written to since `noted` gave `was`.\n"
       "Where not, nothing need have changed."},
      {"in_place", function(&in_place), METH_FASTCALL,
       "in_place(found, kind, /)\n--\n\nOf ((where, name, value), ...): whether each getattr(where, name, None) is value; of `kind` where that is None."},
      {"tensors_of", function(&tensors_of), METH_FASTCALL,
       "tensors_of(owners, held, names, /)\n--\n\nWhat is not None in the dictionaries `held`, a tuple; None where one is not that of its owner,\n"
       "(module, name of an attribute), any more, or its names (name, whether it is None, name, ...) are others."},
      {"lie_at", function(&lie_at), METH_FASTCALL,
       "lie_at(tensors, places, function, /)\n--\n\nWhether `function`, the address of torch's own void*(PyObject*), finds each tensor at its place."},
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods);
}

}  // namespace vf
