"""specache from Python: ctypes over the C library, in one file and without a build step.

    from specache import Engine

    engine = Engine("models/llama")
    session = engine.session(max_tokens=4096)
    session.prefill("Once upon a time")
    for piece in session.generate(100):
        print(piece, end="", flush=True)

The library is found by SPECACHE_LIBRARY (its path), else where the system looks for libspecache.so.0. NumPy is used for
logits if it is there.
"""

import ctypes as c
import os
import queue
import threading

ABI_VERSION = 1
ADD_SPECIAL = 1
IGNORE_EOS = 1
NO_TOKEN = 0xFFFFFFFF
BUFFER, CANCELLED = 10, 6
KV_MODES = ("full", "kivi", "offload", "fetch", "specache")


def _struct(name, fields):
    """A struct that begins with struct_size, which is set."""
    kind = type(name, (c.Structure,), {"_fields_": [("struct_size", c.c_uint32), *fields]})
    return lambda: kind(struct_size=c.sizeof(kind))


u32, i32, u64, f32 = c.c_uint32, c.c_int32, c.c_uint64, c.c_float
LogFn = c.CFUNCTYPE(None, c.c_void_p, i32, c.c_char_p)
EngineOptions = _struct("EngineOptions", [
    ("threads", u32), ("device", c.c_char_p), ("device_kv_budget", u64), ("host_kv_budget", u64), ("lock_memory", u32),
    ("trace", u32), ("log", LogFn), ("log_user_data", c.c_void_p), ("log_level", i32), ("reserved", u32)])
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
        "load_bytes host_bytes").split())])


class Token(c.Structure):
    _fields_ = [("struct_size", u32), ("id", u32), ("index", u64), ("text", c.c_void_p), ("n_bytes", u64), ("is_eos", u32),
                ("reserved", u32)]


class ChatMessage(c.Structure):
    _fields_ = [("role", c.c_char_p), ("content", c.c_char_p)]


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


def _call(name, *args):
    status = getattr(_lib, "specache_" + name)(*args)
    if status != 0:
        raise Error(status)


def _set(options, values, what):
    """Options by name; a misspelt one is an error and not ignored."""
    known = {name for name, _ in options._fields_} - {"struct_size"}
    for name, value in values.items():
        if name not in known:
            raise TypeError(f"{what} has no option {name!r}; it has {', '.join(sorted(known))}")
        setattr(options, name, value)
    return options


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


class _Handle:
    """Freed with the object, or by `close`, or at the end of `with`."""

    def __init__(self, free):
        self._handle, self._free = c.c_void_p(), free

    def close(self):
        handle, self._handle = self._handle, c.c_void_p()
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

    def __init__(self, model, log=None, device=None, **options):
        super().__init__(_lib.specache_engine_free)
        given = EngineOptions()
        _call("engine_options_init", c.byref(given), u32(given.struct_size))
        _set(given, options, "an engine")
        if device is not None:
            given.device = device.encode()
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
        return _text("detokenize", self._handle, (u32 * len(ids))(*ids), c.c_size_t(len(ids)))

    def chat_prompt(self, messages, add_generation_prompt=True):
        """Messages, as dicts of role and content, in the model's own form. Prefill it with add_special=False."""
        given = [ChatMessage(m["role"].encode(), m["content"].encode()) for m in messages]
        array = (ChatMessage * len(given))(*given)
        return _text("chat_prompt", self._handle, array, c.c_size_t(len(given)), i32(add_generation_prompt))

    def __repr__(self):
        return f"<specache.Engine {_text('engine_describe', self._handle)}>"


class Session(_Handle):
    """One sequence of tokens."""

    def __init__(self, engine, max_tokens, kv, options):
        super().__init__(_lib.specache_session_free)
        self.engine = engine
        if max_tokens is None:  # a fork
            return
        given = KvOptions()
        _call("kv_options_init", c.byref(given), u32(given.struct_size))
        given.mode = KV_MODES.index(kv)
        _set(given, options, "a session")
        _call("session_create", engine._handle, c.byref(given), u64(max_tokens), c.byref(self._handle))

    def sampling(self, **options):
        """How tokens are chosen from now on: the options of specache_sampling_options, by default the model's."""
        given = SamplingOptions()
        _call("sampling_options_init", self.engine._handle, c.byref(given), u32(given.struct_size))
        _call("session_set_sampling", self._handle, c.byref(_set(given, options, "sampling")))

    def prefill(self, prompt, add_special=True):
        """Adds a text, or a list of token ids."""
        if isinstance(prompt, str):
            data, flags = prompt.encode(), ADD_SPECIAL if add_special else 0
            _call("session_prefill_text", self._handle, data, c.c_size_t(len(data)), u32(flags))
        else:
            _call("session_prefill", self._handle, (u32 * len(prompt))(*prompt), c.c_size_t(len(prompt)))

    def generate_ids(self, n_tokens, ignore_eos=False, on_text=None):
        """Up to n_tokens token ids; `on_text` gets the text piece by piece, and stops the generation by returning True."""
        ids, raised = [], []

        def on_token(_, token):
            token = token.contents
            if token.id != NO_TOKEN:
                ids.append(token.id)
            try:
                piece = c.string_at(token.text, token.n_bytes).decode()
                return 1 if on_text and piece and on_text(piece) else 0
            except BaseException as e:  # an exception cannot cross C
                raised.append(e)
                return 1

        try:
            callback, flags = TokenFn(on_token), IGNORE_EOS if ignore_eos else 0
            _call("session_generate", self._handle, u64(n_tokens), u32(flags), callback, None, None, None)
        except Error as e:
            if raised:
                raise raised[0]
            if e.status != CANCELLED:
                raise
        return ids

    def generate(self, n_tokens, ignore_eos=False):
        """Yields the text of up to n_tokens tokens, piece by piece. Leaving the loop early ends the generation."""
        pieces, left = queue.Queue(), threading.Event()

        def work():
            try:
                self.generate_ids(n_tokens, ignore_eos, lambda piece: (pieces.put(piece), left.is_set())[1])
                pieces.put(None)
            except BaseException as e:
                pieces.put(e)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            left.set()
            thread.join()

    def step(self, token):
        """Feeds a token; `logits` are then those of what follows."""
        _call("session_step", self._handle, u32(token), None, c.c_size_t(0))

    def logits(self):
        """[vocab_size] of what follows the last token: a NumPy array of float32, or a list where there is no NumPy."""
        values = _array(f32, "session_logits", self._handle)
        try:
            import numpy
        except ImportError:
            return list(values)
        return numpy.frombuffer(values, dtype=numpy.float32)

    def tokens(self):
        return list(_array(u32, "session_tokens", self._handle))

    def fork(self):
        """A second session with the same tokens."""
        fork = Session(self.engine, None, None, None)
        _call("session_fork", self._handle, c.byref(fork._handle))
        return fork

    def truncate(self, n_tokens):
        _call("session_truncate", self._handle, u64(n_tokens))

    def reserve(self, max_tokens):
        _call("session_reserve", self._handle, u64(max_tokens))

    def reset(self):
        _call("session_reset", self._handle)

    def cancel(self):
        """Ends the call that runs, from another thread."""
        _call("session_cancel", self._handle)

    def stats(self):
        stats = Stats()
        _call("session_get_stats", self._handle, c.byref(stats))
        return {name: getattr(stats, name) for name, _ in stats._fields_ if name != "struct_size"}
