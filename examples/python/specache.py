"""specache from Python: ctypes over the C library, in one file and without a build step.

    from specache import Engine

    engine = Engine("models/llama")
    session = engine.session(max_tokens=4096)
    session.prefill("Once upon a time")
    for piece in session.generate(100):
        print(piece, end="", flush=True)

The library is found by SPECACHE_LIBRARY (its path), else where the system looks for libspecache.so.0. NumPy is used for
logits if it is there.

Of the calls with one session only one runs at a time: another one, made on another thread or while a loop over `generate` has
not ended, raises Error (status BUSY), except for `cancel`, `clear_cancel` and `close`. Ctrl-C stops a generation. Engines,
sessions and loops may be closed in any order, and more than once. At the end of the program what still runs is cancelled and
waited for.
"""

import array
import atexit
import ctypes as c
import operator
import os
import queue
import threading
import time

ABI_VERSION = 1
ADD_SPECIAL = 1
IGNORE_EOS = 1
NO_TOKEN = 0xFFFFFFFF
BUFFER, CANCELLED, BUSY = 10, 6, 7
KV_MODES = ("full", "kivi", "offload", "fetch", "specache")
LINEAR = ("auto", "fused", "cublas")
GATHER = ("default", "gpu", "cpu", "auto")


def _struct(name, fields):
    """A struct that begins with struct_size, which is set."""
    kind = type(name, (c.Structure,), {"_fields_": [("struct_size", c.c_uint32), *fields]})
    return lambda: kind(struct_size=c.sizeof(kind))


u32, i32, u64, f32 = c.c_uint32, c.c_int32, c.c_uint64, c.c_float
LogFn = c.CFUNCTYPE(None, c.c_void_p, i32, c.c_char_p)
EngineOptions = _struct("EngineOptions", [
    ("threads", u32), ("device", c.c_char_p), ("device_budget", u64), ("host_kv_budget", u64), ("lock_memory", u32),
    ("trace", u32), ("log", LogFn), ("log_user_data", c.c_void_p), ("log_level", i32), ("linear", i32),
    ("gather", i32), ("gather_threads", u32)])
KvOptions = _struct("KvOptions", [
    ("mode", i32), ("bits", u32), ("group_size", u32), ("residual_len", u32), ("top_k", u32), ("dtype", i32)])
SamplingOptions = _struct("SamplingOptions", [
    ("temperature", f32), ("top_k", u32), ("top_p", f32), ("min_p", f32), ("repeat_penalty", f32), ("seed", u64)])
ModelInfo = _struct("ModelInfo", [
    *((name, u32) for name in ("vocab_size n_layers n_heads n_kv_heads head_dim hidden_size has_tokenizer "
                               "has_chat_template n_eos").split()), ("max_positions", u64), ("weight_bytes", u64)])
Stats = _struct("Stats", [
    ("n_layers", u32), ("n_tokens", u64), ("max_tokens", u64), ("steps", u64), ("hit_rate", c.c_double),
    ("acceptance", c.c_double), *((name, u64) for name in (
        "accepted compared fetched_bytes pre_decode_bytes offloaded_bytes exposed_ns packed_bytes wide_bytes slot_bytes "
        "load_bytes host_bytes exposed_steps").split())])
Memory = _struct("Memory", [
    ("reserved", u32), *((name, u64) for name in (
        "device_bytes device_budget device_weight_bytes device_kv_bytes device_workspace_bytes weight_bytes "
        "host_mapped_bytes host_kv_budget host_page_bytes host_pages_leased host_pages_reserved host_pages_free").split())])
MemoryPlan = _struct("MemoryPlan", [
    ("reserved", u32), *((name, u64) for name in (
        "packed_bytes wide_bytes slot_bytes load_bytes device_bytes prefill_bytes host_bytes weight_bytes").split())])


class Token(c.Structure):
    _fields_ = [("struct_size", u32), ("id", u32), ("index", u64), ("text", c.c_void_p), ("n_bytes", u64), ("is_eos", u32),
                ("reserved", u32)]


class ChatMessage(c.Structure):
    _fields_ = [("role", c.c_char_p), ("content", c.c_char_p)]


class Step(c.Structure):
    _fields_ = [("session", c.c_void_p), ("logits", c.POINTER(f32)), ("n_logits", u64), ("token", u32), ("next", u32),
                ("status", i32), ("reserved", u32)]


class LayerStats(c.Structure):
    _fields_ = [(name, u64) for name in ("hits", "hits_of", "fetched", "selected")]


TokenFn = c.CFUNCTYPE(i32, c.c_void_p, c.POINTER(Token))

_lib = c.CDLL(os.environ.get("SPECACHE_LIBRARY", "libspecache.so.0"))
_lib.specache_last_error.restype = c.c_char_p
_lib.specache_status_name.restype = c.c_char_p
for _free in (_lib.specache_engine_free, _lib.specache_session_free):
    _free.argtypes, _free.restype = [c.c_void_p], None


class Error(Exception):
    """What a call came to: `status` is the number, the text says why."""

    def __init__(self, status):
        self.status = status
        super().__init__(_lib.specache_last_error().decode())


def _check(status):
    if status != 0:
        raise Error(status)


class _Calls:
    """The calls that are in the library. The interpreter must not end under one that calls back: Python would end its thread
    within the callback, which C cannot bear. So at the end of the program all are cancelled and waited for. Without a lock:
    the garbage collector, or a signal, may have this thread call from within the upkeep."""

    def __init__(self):
        self.running, self.ending = {}, False
        atexit.register(self.end)

    def __call__(self, name, *args):
        key = object()
        # In this order: `end` sees the call, or the call sees the end.
        self.running[key] = (threading.get_ident(), name, args)
        try:
            if self.ending:
                raise RuntimeError("the program ends: no call of specache can begin")
            _check(getattr(_lib, "specache_" + name)(*args))
        finally:
            del self.running[key]

    def end(self):
        self.ending = True
        # This thread is in none: one that Ctrl-C has torn out of the list's upkeep is over.
        while others := [call for thread, *call in self.running.copy().values() if thread != threading.get_ident()]:
            for name, args in others:
                if name.startswith("session_") and name != "session_create":
                    _lib.specache_session_cancel(args[0])
            # A callback may have been on its way to its next token, or a call to its beginning.
            time.sleep(0.02)


_call = _Calls()


def _int(kind, value, what):
    """A number of C; ctypes would cut one off that does not fit."""
    value, bits = operator.index(value), 8 * c.sizeof(kind)
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind is i32 else (0, (1 << bits) - 1)
    if not least <= value <= most:
        raise OverflowError(f"{what} {value}: must be from {least} to {most}")
    return kind(value)


def _numbers(ids):
    """Token ids as an array, which would take bytes for four of an id's each. Raises for what does not fit."""
    if isinstance(ids, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"token ids are a list of numbers, not {type(ids).__name__}; text is a str, where a text is taken")
    return array.array("I", ids)


def _ids(ids):
    """Token ids of C, and how many."""
    ids = _numbers(ids)
    return (u32 * len(ids)).from_buffer(ids) if ids else None, c.c_size_t(len(ids))


def _c_text(text, what):
    data = text.encode()
    if b"\0" in data:
        raise ValueError(f"{what}: the character NUL would end it")
    return data


def _index(names, name, what):
    if name not in names:
        raise ValueError(f"{what} {name!r}: must be one of {', '.join(names)}")
    return names.index(name)


def _set(options, values, what):
    """Options by name; a misspelt one is an error and not ignored."""
    known = {name: kind for name, kind in options._fields_ if name != "struct_size"}
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}; it has {', '.join(sorted(known))}")
        setattr(options, name, _int(known[name], value, name) if known[name] in (u32, i32, u64) else value)
    return options


def _kv(mode, options):
    given = KvOptions()
    _call("kv_options_init", c.byref(given), u32(given.struct_size))
    given.mode = _index(KV_MODES, mode, "kv")
    return _set(given, options, "a session")


def _dict(struct):
    return {name: getattr(struct, name) for name, _ in struct._fields_ if name not in ("struct_size", "reserved")}


def _text(name, *args):
    """A text that the library returns: asked for its length first."""
    n = c.c_size_t()
    _call(name, *args, None, c.c_size_t(0), c.byref(n))
    buffer = c.create_string_buffer(n.value + 1)
    _call(name, *args, buffer, c.c_size_t(n.value + 1), c.byref(n))
    return buffer.raw[: n.value].decode()


def _array(kind, name, *args):
    n = c.c_size_t()
    _call(name, *args, None, c.c_size_t(0), c.byref(n))
    values = (kind * n.value)()
    _call(name, *args, values, c.c_size_t(n.value), c.byref(n))
    return values


def _floats(values):
    """A NumPy array of float32, or a list where there is no NumPy."""
    try:
        import numpy
    except ImportError:
        return list(values)
    return numpy.frombuffer(values, dtype=numpy.float32)


def _messages(messages):
    given = [ChatMessage(_c_text(m["role"], "a role"), _c_text(m["content"], "a message")) for m in messages]
    return (ChatMessage * len(given))(*given), c.c_size_t(len(given))


def plan(model, max_tokens, kv="specache", **options):
    """Bytes that such a session would take, as a dict, without loading the model (specache_plan)."""
    result = MemoryPlan()
    path, kv = os.fsencode(model), _kv(kv, options)
    _call("plan", u32(ABI_VERSION), path, c.byref(kv), _int(u64, max_tokens, "max_tokens"), c.byref(result))
    return _dict(result)


def step_batch(sessions, tokens, logits=False):
    """A step of several sessions of one engine at once, which reads the weights once for all. Returns what their sampling
    options choose next, which is not fed; with `logits` also a row of logits for each."""
    tokens, vocab = _numbers(tokens), sessions[0].engine.info.vocab_size if sessions else 0
    if len(tokens) != len(sessions):
        raise ValueError(f"{len(tokens)} tokens for {len(sessions)} sessions")
    rows = [(f32 * vocab)() if logits else None for _ in sessions]
    steps = (Step * len(sessions))(*(
        Step(session=session._ready(), logits=row, n_logits=vocab if logits else 0, token=token)
        for session, token, row in zip(sessions, tokens, rows)))
    _call("step_batch", steps, c.c_size_t(len(steps)), c.c_size_t(c.sizeof(Step)))
    chosen = [step.next for step in steps]
    return (chosen, [_floats(row) for row in rows]) if logits else chosen


class _Handle:
    """Freed with the object, or by `close`, or at the end of `with`."""

    def __init__(self, free):
        self._handle, self._free = c.c_void_p(), free

    def close(self):
        """May be called again, and at any time: other calls raise Error (status HANDLE) from then on."""
        handle, self._handle = self._handle, None
        if handle:
            self._free(handle)

    def __del__(self):
        if getattr(self, "_handle", None):
            self.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Engine(_Handle):
    """A model on a device. Options are those of specache_engine_options; `log` is called with level and message."""

    def __init__(self, model, log=None, device=None, linear="auto", gather="default", **options):
        super().__init__(_lib.specache_engine_free)
        given = EngineOptions()
        _call("engine_options_init", c.byref(given), u32(given.struct_size))
        _set(given, options, "an engine")
        given.linear = _index(LINEAR, linear, "linear")
        given.gather = _index(GATHER, gather, "gather")
        if device is not None:
            given.device = _c_text(device, "device")
        if log is not None:
            self._log = LogFn(lambda _, level, message: log(level, message.decode()))  # lives as long as the engine
            given.log = self._log
        _call("engine_create", u32(ABI_VERSION), os.fsencode(model), c.byref(given), c.byref(self._handle))
        self.info = ModelInfo()
        _call("engine_model_info", self._handle, c.byref(self.info))

    def session(self, max_tokens, kv="specache", **options):
        """An empty sequence. Options are those of specache_kv_options."""
        return Session(self, max_tokens, kv, options)

    def tokenize(self, text, add_special=True):
        data = text.encode()
        return list(_array(u32, "tokenize", self._handle, data, c.c_size_t(len(data)), u32(ADD_SPECIAL if add_special else 0)))

    def detokenize(self, ids):
        return _text("detokenize", self._handle, *_ids(ids))

    def chat_prompt(self, messages, add_generation_prompt=True):
        """Messages, as dicts of role and content, in the model's own form. Prefill it with add_special=False, or let
        Session.prefill_chat do both."""
        return _text("chat_prompt", self._handle, *_messages(messages), i32(bool(add_generation_prompt)))

    def eos_tokens(self):
        """The ids of the tokens that end a text."""
        return list(_array(u32, "engine_eos_tokens", self._handle))

    def memory(self):
        """What the engine and its sessions hold, as a dict: the fields of specache_memory."""
        memory = Memory()
        _call("engine_memory", self._handle, c.byref(memory))
        return _dict(memory)

    def trace(self, on=True):
        """Switches tracing on or off, for an engine that was made with trace=1."""
        _call("engine_trace", self._handle, i32(bool(on)))

    def trace_write(self, path):
        """Writes what was traced to a file, for Perfetto."""
        _call("engine_trace_write", self._handle, os.fsencode(path))

    def measure_waits(self, on=True):
        """On a GPU: has steps measure how long they wait for copies (stats: exposed_ns, exposed_steps)."""
        _call("engine_measure_waits", self._handle, i32(bool(on)))

    def __repr__(self):
        return f"<specache.Engine {_text('engine_describe', self._handle)}>"


def _next(items):
    """What comes next from another thread. In between Python looks for Ctrl-C: the system may have given the signal to a
    thread that does not wait here, which would not end the wait."""
    while True:
        try:
            return items.get(timeout=0.1)
        except queue.Empty:
            pass


class _Loop:
    """A loop over `generate`. Whoever leaves it says so here and waits for nothing, as it may be the garbage collector: on a
    thread that holds a lock which the generation needs to come to its end. The next call with the session waits."""

    def __init__(self):
        self.left, self.over = False, threading.Event()


def _end_session(handle, cancel=_lib.specache_session_cancel, free=_lib.specache_session_free):
    """By names of its own: this module's may be gone when the last objects are."""
    cancel(handle)  # nobody wants the rest of what runs
    free(handle)


class Session(_Handle):
    """One sequence of tokens. `close` also ends what runs with it."""

    def __init__(self, engine, max_tokens, kv, options):
        super().__init__(_end_session)
        self.engine, self._loops = engine, set()
        if max_tokens is None:  # a fork
            return
        given = _kv(kv, options)
        room = _int(u64, max_tokens, "max_tokens")
        _call("session_create", engine._handle, c.byref(given), room, c.byref(self._handle))

    def close(self):
        for loop in self._loops.copy():
            loop.left = True
        super().close()

    def _ready(self):
        """The handle, when loops that were left have come to their end."""
        for loop in self._loops.copy():
            if loop.left:
                loop.over.wait()
            if loop.over.is_set():
                self._loops.discard(loop)
        return self._handle

    def sampling(self, **options):
        """How tokens are chosen from now on: the options of specache_sampling_options, by default the model's."""
        given = SamplingOptions()
        _call("sampling_options_init", self.engine._handle, c.byref(given), u32(given.struct_size))
        _call("session_set_sampling", self._ready(), c.byref(_set(given, options, "sampling")))

    def prefill(self, prompt, add_special=True):
        """Adds a text, or a list of token ids."""
        if isinstance(prompt, str):
            data, flags = prompt.encode(), ADD_SPECIAL if add_special else 0
            self._run("session_prefill_text", self._ready(), data, c.c_size_t(len(data)), u32(flags))
        else:
            self._run("session_prefill", self._ready(), *_ids(prompt))

    def prefill_chat(self, messages):
        """A conversation up to where its next answer begins: all messages so far, each time. Returns how many tokens of it the
        session had already."""
        kept = u64()
        self._run("session_prefill_chat", self._ready(), *_messages(messages), c.byref(kept))
        return kept.value

    def _run(self, name, *args):
        """A call that takes long, on a thread of its own, so that Ctrl-C reaches the one that waits, and ends the call."""
        ended = queue.SimpleQueue()

        def work():
            try:
                _call(name, *args)
                ended.put(None)
            except BaseException as e:
                ended.put(e)

        threading.Thread(target=work, daemon=True).start()
        try:
            error = _next(ended)
        except BaseException:
            _lib.specache_session_cancel(args[0])  # may have been freed: nothing to end then
            ended.get()
            _lib.specache_session_clear_cancel(args[0])  # if the call had ended by then
            raise
        if error is not None:
            raise error

    def _generate(self, run, handle, n_tokens, ignore_eos, show):
        """Generates by way of `run`, and shows ids and text; `show` stops the generation by returning True."""
        raised = []

        def on_token(_, token):
            token = token.contents
            try:
                piece = c.string_at(token.text, token.n_bytes).decode()
                return 1 if _call.ending or show(token.id, piece) else 0
            except BaseException as e:  # an exception cannot cross C
                raised.append(e)
                return 1

        count, callback, flags = _int(u64, n_tokens, "n_tokens"), TokenFn(on_token), IGNORE_EOS if ignore_eos else 0
        try:
            run("session_generate", handle, count, u32(flags), callback, None, None, None)
        except Error as e:
            if raised:
                raise raised[0]
            if e.status != CANCELLED:
                raise

    def generate_ids(self, n_tokens, ignore_eos=False, on_text=None):
        """Up to n_tokens token ids; `on_text` gets the text piece by piece, on another thread, and stops the generation by
        returning True."""
        ids = []

        def show(id, piece):
            if id != NO_TOKEN:
                ids.append(id)
            return on_text and piece and on_text(piece)

        self._generate(self._run, self._ready(), n_tokens, ignore_eos, show)
        return ids

    def generate(self, n_tokens, ignore_eos=False):
        """Yields the text of up to n_tokens tokens, piece by piece. Leaving the loop early ends the generation, which is at most
        a few pieces ahead of what was taken; so does `close` of the session. Until the loop has ended or is left (`close` of what
        this returns), other calls with this session raise Error (status BUSY)."""
        handle, loop, pieces, taken = self._ready(), _Loop(), queue.SimpleQueue(), threading.Semaphore(1)

        def show(_, piece):
            if piece:
                pieces.put(piece)
                # Whoever is slow has the generation wait, whoever has left takes no more.
                while not (loop.left or _call.ending or taken.acquire(timeout=0.05)):
                    pass
            return loop.left

        def work():
            last = None
            try:
                self._generate(_call, handle, n_tokens, ignore_eos, show)
            except BaseException as e:
                last = e
            loop.over.set()
            pieces.put(last)

        threading.Thread(target=work, daemon=True).start()
        self._loops.add(loop)
        try:
            while (piece := _next(pieces)) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                taken.release()
                yield piece
        finally:
            loop.left = True

    def step(self, token):
        """Feeds a token; `logits` are then those of what follows."""
        _call("session_step", self._ready(), _int(u32, token, "token"), None, c.c_size_t(0))

    def logits(self):
        """[vocab_size] of what follows the last token: a NumPy array of float32, or a list where there is no NumPy."""
        return _floats(_array(f32, "session_logits", self._ready()))

    def sample(self):
        """The token that the sampling options choose from these logits. It is not fed."""
        token = u32()
        _call("session_sample", self._ready(), c.byref(token))
        return token.value

    def tokens(self):
        return list(_array(u32, "session_tokens", self._ready()))

    def fork(self):
        """A second session with the same tokens."""
        fork = Session(self.engine, None, None, None)
        _call("session_fork", self._ready(), c.byref(fork._handle))
        return fork

    def truncate(self, n_tokens):
        _call("session_truncate", self._ready(), _int(u64, n_tokens, "n_tokens"))

    def reserve(self, max_tokens):
        _call("session_reserve", self._ready(), _int(u64, max_tokens, "max_tokens"))

    def reset(self):
        _call("session_reset", self._ready())

    def cancel(self):
        """Ends the call that runs, from another thread; else the next one."""
        _check(_lib.specache_session_cancel(self._handle))

    def clear_cancel(self):
        """Takes back a request to cancel that nothing has heeded yet."""
        _check(_lib.specache_session_clear_cancel(self._handle))

    def stats(self):
        """The fields of specache_session_stats, as a dict."""
        stats = Stats()
        _call("session_get_stats", self._ready(), c.byref(stats))
        return _dict(stats)

    def layer_stats(self):
        """The fields of specache_layer_stats of each layer, as dicts."""
        return [_dict(layer) for layer in _array(LayerStats, "session_layer_stats", self._ready())]
