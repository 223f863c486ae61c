/*
 * specache.h: the C interface of specache-engine.
 *
 * A short tour. An engine is a model on a device; a session is one sequence of tokens with its KV cache. Prefill a session
 * with a prompt, then let it generate:
 *
 *     specache_engine *engine = NULL;
 *     specache_session *session = NULL;
 *     specache_engine_create(SPECACHE_ABI_VERSION, "models/llama", NULL, &engine);
 *     specache_session_create(engine, NULL, 4096, &session);
 *     specache_session_prefill_text(session, "Once upon a time", 16, SPECACHE_ADD_SPECIAL);
 *     specache_session_generate(session, 100, 0, on_token, NULL, NULL, NULL);
 *     specache_session_free(session);
 *     specache_engine_free(engine);
 *
 * docs/embedding.md explains more, examples/c and examples/python are complete programs.
 *
 * STATUS. Functions that can fail return 0 (SPECACHE_OK) or one of the SPECACHE_ERR_* codes; then specache_last_error() on
 * the same thread says in words what is wrong and what to do. A call that fails has changed nothing, except where its
 * description says so. Nothing that is passed in makes the library crash or exit, as long as pointers are NULL or point to as
 * much memory as they say. Descriptions name what a function can fail with. Not named each time, as every function that takes
 * such a thing gives it: SPECACHE_ERR_HANDLE for a handle; _USAGE for NULL or a misaligned pointer where a value is needed, for
 * flags that are not known and for text that is not UTF-8; _BUFFER for a buffer; _ABI for a struct_size; and for sessions
 * _BUSY, _INTERNAL once dead, what follows, and _USAGE while they are without memory (specache_session_reset).
 *
 * SESSIONS THAT FAIL. Where NaN or infinity comes out of the model (SPECACHE_ERR_FAILED), or a copy or the device fails in the
 * middle of a call (SPECACHE_ERR_DEVICE), nobody knows what the session's cache holds. All calls that would use it give the same
 * status with the same words from then on, until specache_session_reset or specache_session_free. The tokens that it held before
 * and its statistics can still be asked for, and its sampling options set.
 *
 * HANDLES. specache_engine and specache_session are names, not addresses: they cannot be dereferenced, are never used twice in
 * a process, and the library knows which of them live. NULL, a handle that was freed and a handle of the other kind give
 * SPECACHE_ERR_HANDLE. Freeing one of those does nothing.
 *
 * OWNERSHIP. What a *_create or *_fork function gives belongs to the caller, who frees it with the *_free of its kind. Freeing
 * is allowed at any time, in callbacks and while other threads are in calls with the same handle: those calls end as usual,
 * and the last user frees the memory. A session keeps its engine in memory. Pointers that are passed in are used during the
 * call only; buffers belong to the caller. After fork(2) only the parent may go on using the library.
 *
 * THREADS. Every function may be called on any thread. Sessions are independent of each other. Of the calls with one session
 * only one runs at a time: another one, made meanwhile on another thread or in a callback, gives SPECACHE_ERR_BUSY, except for
 * specache_session_cancel, specache_session_clear_cancel and specache_session_free, which always work. A thread that calls needs
 * at least 256 KiB of stack. Callbacks return normally: one that ends otherwise (an exception, longjmp, pthread_exit, a thread
 * that is cancelled) ends the process. Calls are allowed until a thread's very end, in destructors of thread-local data too;
 * there, specache_last_error may have no words.
 *
 * BUFFERS. Functions that fill an array or a text take its capacity and return in *n how much there is. If that is more than
 * the capacity, nothing is written and the call gives SPECACHE_ERR_BUFFER; a NULL buffer of capacity 0 asks for *n alone, and
 * gives SPECACHE_OK. Texts are UTF-8; a text that is returned is followed by a NUL, which *n does not count and the capacity
 * must have room for. Texts are passed in as pointer and length in bytes, or as C strings, as each function says.
 *
 * OPTIONS. Structs begin with struct_size. Set it, and the defaults, with the init function; a program that was compiled with an
 * older header passes its smaller struct, and gets the defaults of what that does not have. NULL instead of options means the
 * defaults. Structs that are filled by the library work in the same way: set struct_size to sizeof and the rest is filled in.
 *
 * UNITS. Sizes in bytes, times in nanoseconds, lengths of sequences in tokens.
 *
 * VERSIONS. The major version of the ABI is part of the shared library's name, libspecache.so.<major>. Within it, functions and
 * fields are added and never changed: a program runs with every library of the same major and the same or a higher minor.
 * Structs grow at their end, by fields that are aligned without a gap before them and by a `reserved` one where the end would
 * have one, so that every size that a struct ever had says which fields it has. Options that are added mean by 0 what was done
 * before there was a choice.
 */
#ifndef SPECACHE_H
#define SPECACHE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- versions and errors ---- */

#define SPECACHE_ABI_MAJOR 0u
#define SPECACHE_ABI_MINOR 1u
/* What this header describes: specache_engine_create and specache_plan compare it with the library's. */
#define SPECACHE_ABI_VERSION ((SPECACHE_ABI_MAJOR << 16) | SPECACHE_ABI_MINOR)

/* What a call comes to. */
enum {
    SPECACHE_OK = 0,
    SPECACHE_ERR_FAILED = 1,        /* a file could not be read or written, or NaN or infinity came out of the model */
    SPECACHE_ERR_USAGE = 2,         /* an argument, or a call, that cannot be */
    SPECACHE_ERR_MODEL = 3,         /* a model folder, or a file in it, that cannot be used */
    SPECACHE_ERR_OUT_OF_MEMORY = 4, /* a budget, or the machine, has too little memory; found before any is taken */
    SPECACHE_ERR_DEVICE = 5,        /* the device, a copy between host and device, or a thread of ours failed */
    SPECACHE_ERR_CANCELLED = 6,     /* specache_session_cancel, or a callback that returned non-zero */
    SPECACHE_ERR_BUSY = 7,          /* another call with this session is running */
    SPECACHE_ERR_HANDLE = 8,        /* NULL, a freed handle, or one of another kind */
    SPECACHE_ERR_ABI = 9,           /* a struct_size or an ABI version that this library does not know */
    SPECACHE_ERR_BUFFER = 10,       /* a buffer is too small; *n says what is needed */
    SPECACHE_ERR_INTERNAL = 11      /* a bug in the library: it is reported, and the sessions of that call are dead: they
                                       give this status until they are freed. The engine and other sessions go on. */
};

/* The ABI version of the library, as SPECACHE_ABI_VERSION. */
uint32_t specache_abi_version(void);

/* Version and commit of the library, such as "0.1.0 (78ef808a1b)". Never freed. */
const char *specache_version(void);

/* A status in two or three words, such as "out of memory". Never freed. */
const char *specache_status_name(int32_t status);

/* Why the last call that failed on this thread did, in words. Never NULL; "" before the first failure. The text is valid until
 * the next call that fails on this thread, and is not freed. */
const char *specache_last_error(void);

/* ---- engine: a model on a device ---- */

typedef struct specache_engine specache_engine;
typedef struct specache_session specache_session;

/* Levels of log messages. */
enum {
    SPECACHE_LOG_ERROR = 1, /* bugs of the library */
    SPECACHE_LOG_WARN = 2,  /* what works, and may not be what is wanted */
    SPECACHE_LOG_INFO = 3,  /* rarely: what an engine is, why the CPU computes where a GPU would be taken, kernels that are
                               compiled first, what SPECACHE_GATHER_AUTO takes */
    SPECACHE_LOG_DEBUG = 4  /* once per session */
};

/* Receives log messages, on the thread of the call that has something to say; messages of several threads may come at the same
 * time. Those of specache_engine_create come while it works, also if it fails then. What a thread of the library has to say
 * waits for the next call, and comes once, to one engine that has a callback. `message` is valid during the call. The callback
 * may call any function of this library, with handles that are not busy, and must return normally (THREADS). */
typedef void (*specache_log_fn)(void *user_data, int32_t level, const char *message);

/* How a GPU makes the matrix products of a layer. */
enum {
    SPECACHE_LINEAR_AUTO = 0,  /* fused kernels for up to 8 rows, cuBLASLt for more (default) */
    SPECACHE_LINEAR_FUSED = 1, /* fused kernels always: a sequence's results do not depend on the batch that it is in */
    SPECACHE_LINEAR_CUBLAS = 2 /* cuBLASLt always; not on the CPU, not for weights of 32 bits */
};

/* How a GPU gets the pairs that SPECACHE_KV_SPECACHE and _FETCH have selected from host memory. Results do not depend on it. */
enum {
    SPECACHE_GATHER_DEFAULT = 0, /* on a GPU as SPECACHE_GATHER_GPU; on the CPU as SPECACHE_GATHER_CPU */
    SPECACHE_GATHER_GPU = 1,     /* its multiprocessors read them; not on the CPU */
    SPECACHE_GATHER_CPU = 2,     /* threads of the host gather them; steps are not given to a GPU as CUDA graphs */
    SPECACHE_GATHER_AUTO = 3     /* on a GPU 8 steps of a batch go either way, and the rest the faster one */
};

typedef struct specache_engine_options {
    uint32_t struct_size;
    uint32_t threads;          /* compute threads, up to 1024; 0 (default): as many as the process may use */
    const char *device;        /* "auto" (default, also NULL), "cpu", "cuda", "cuda:N" */
    uint64_t device_budget;    /* most bytes of device memory; on a GPU for weights, KV caches and workspace together, on the CPU
                                  for KV caches; 0 (default): no limit of ours, on a GPU what is free when the engine is made */
    uint64_t host_kv_budget;   /* most bytes of host memory for 16-bit KV copies; 0 (default): no limit */
    uint32_t lock_memory;      /* non-zero: lock the 16-bit copies in memory, so that they are never swapped out */
    uint32_t trace;            /* non-zero: allow specache_engine_trace; tracing itself begins switched off. On a GPU steps are
                                  slower from then on, traced or not: they are not given to it as CUDA graphs */
    specache_log_fn log;       /* NULL (default): no messages */
    void *log_user_data;
    int32_t log_level;         /* the highest level that is wanted, 0: none; default SPECACHE_LOG_INFO */
    int32_t linear;            /* SPECACHE_LINEAR_*: how a GPU makes matrix products */
    int32_t gather;            /* SPECACHE_GATHER_* */
    uint32_t gather_threads;   /* threads that gather, up to 256; 0 (default): a quarter of those that can run,
                                  1 to 16, and one for each NUMA node */
} specache_engine_options;

/* Sets struct_size and the defaults. `struct_size` is sizeof(specache_engine_options).
 * SPECACHE_ERR_ABI for a size that this library does not know. */
int32_t specache_engine_options_init(specache_engine_options *options, uint32_t struct_size);

/* Loads a model: a folder in Hugging Face layout, "org/name" for one in the Hugging Face cache (HF_HUB_CACHE, HF_HOME), or
 * "synthetic:SHAPE" for random weights. Weights are mapped, not copied.
 * `abi_version` is SPECACHE_ABI_VERSION. `model` is a C string, `options` may be NULL. *engine is NULL after a failure.
 * SPECACHE_ERR_ABI, _USAGE (options, a GPU's number beyond those that there are, no such synthetic shape, a model that the GPU
 * asked for has no kernels for), _MODEL, _FAILED (unreadable files), _DEVICE (no GPU where one is asked for, or one that cannot
 * be used; threads that cannot be started), _OUT_OF_MEMORY (a GPU too small for the weights). */
int32_t specache_engine_create(uint32_t abi_version, const char *model, const specache_engine_options *options,
                               specache_engine **engine);

/* Gives the engine up. Its sessions remain usable; its memory is freed with the last of them. */
void specache_engine_free(specache_engine *engine);

typedef struct specache_model_info {
    uint32_t struct_size;
    uint32_t vocab_size;     /* token ids are below this; the length of logits */
    uint32_t n_layers;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t hidden_size;
    uint32_t has_tokenizer;     /* 1 or 0 */
    uint32_t has_chat_template; /* 1 or 0 */
    uint32_t n_eos;             /* tokens that end a text: specache_engine_eos_tokens */
    uint64_t max_positions;     /* tokens that the model was trained for */
    uint64_t weight_bytes;      /* of its matrices, on the device */
} specache_model_info;

/* Fills *info.
 * SPECACHE_ERR_HANDLE, _USAGE (NULL), _ABI. */
int32_t specache_engine_model_info(specache_engine *engine, specache_model_info *info);

/* The ids of the tokens that end a text.
 * SPECACHE_ERR_HANDLE, _USAGE (NULL), _BUFFER. */
int32_t specache_engine_eos_tokens(specache_engine *engine, uint32_t *ids, size_t capacity, size_t *n);

/* One line for people: the model and the device.
 * SPECACHE_ERR_HANDLE, _USAGE (NULL), _BUFFER. */
int32_t specache_engine_describe(specache_engine *engine, char *text, size_t capacity, size_t *n);

typedef struct specache_memory {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t device_bytes;        /* all device memory that the budget counts, in three kinds: */
    uint64_t device_budget;       /* the most that this may be, on a GPU at most what was free at first; UINT64_MAX: no limit */
    uint64_t device_weight_bytes; /* weights, on a GPU; 0 on the CPU, where they are mapped from their files */
    uint64_t device_kv_bytes;     /* KV caches of all sessions, and what prompts need while they are prefilled */
    uint64_t device_workspace_bytes; /* what a GPU works in: it grows with the batch, and calls that run at once have their own.
                                        Uncounted on the CPU: 0 */
    uint64_t weight_bytes;        /* of the model's matrices, wherever they are */
    uint64_t host_mapped_bytes;   /* mapped on the host for 16-bit copies; kept for later sessions */
    uint64_t host_kv_budget;      /* UINT64_MAX: no limit */
    uint64_t host_page_bytes;     /* the pages that the host memory consists of: */
    uint64_t host_pages_leased;   /* in use; forks share pages */
    uint64_t host_pages_reserved; /* promised to sessions that have not filled them yet */
    uint64_t host_pages_free;     /* neither */
} specache_memory;

/* Fills *memory: what the engine and all its sessions hold now. After the last was freed, device_kv_bytes, leased and reserved
 * are 0.
 * SPECACHE_ERR_HANDLE, _USAGE (NULL), _ABI. */
int32_t specache_engine_memory(specache_engine *engine, specache_memory *memory);

/* Switches tracing on (non-zero) or off, for an engine that was made with options.trace: what ran when on which stream. Slices
 * stay in memory (about 100 bytes each) until they are written.
 * SPECACHE_ERR_HANDLE, _USAGE for an engine without options.trace. */
int32_t specache_engine_trace(specache_engine *engine, int32_t on);

/* Writes what was traced since the last time to a file (a C string; replaced if it exists) in the Chrome trace format, which
 * Perfetto opens. A regular file is replaced when all is written: after a failure it is as before, and nothing of the trace is
 * lost. Another file of this name with ".<process>.<number>.partial" behind it is there meanwhile. A copy that is still under
 * way, such as a step's prefetch for the next one, is in the file after this one.
 * SPECACHE_ERR_HANDLE, _USAGE for an engine without options.trace, _FAILED. */
int32_t specache_engine_trace_write(specache_engine *engine, const char *path);

/* On a GPU: has steps measure from now on (non-zero) or no longer how long they wait for copies (specache_session_stats). Off at
 * first: steps that measure are slower, as they are not given to the GPU as CUDA graphs. An engine with options.trace always
 * measures, as the CPU does, where this changes nothing.
 * SPECACHE_ERR_HANDLE. */
int32_t specache_engine_measure_waits(specache_engine *engine, int32_t on);

/* ---- text ---- */

/* Flags of the functions that tokenise: add the special tokens that the model's texts begin with. */
#define SPECACHE_ADD_SPECIAL 1u

/* Token ids of a text of `n_bytes` bytes.
 * SPECACHE_ERR_USAGE for text that is not UTF-8 (with the byte's place) and for a model without a tokenizer; _MODEL for a
 * tokenizer that has no id for a part of the text. */
int32_t specache_tokenize(specache_engine *engine, const char *text, size_t n_bytes, uint32_t flags, uint32_t *ids,
                          size_t capacity, size_t *n);

/* The text of some ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
 * SPECACHE_ERR_USAGE for ids beyond the vocabulary and for a model without a tokenizer; _MODEL for a tokenizer whose decoder
 * fails. */
int32_t specache_detokenize(specache_engine *engine, const uint32_t *ids, size_t n_ids, char *text, size_t capacity,
                            size_t *n);

typedef struct specache_chat_message {
    const char *role;    /* a C string: "system", "user", "assistant", or what else the template knows */
    const char *content; /* a C string */
} specache_chat_message;

/* Messages as a prompt, by the model's chat template (chat_template.jinja, else that of tokenizer_config.json). The text has the
 * special tokens written out: prefill it without SPECACHE_ADD_SPECIAL. With `add_generation_prompt` (non-zero) it ends where
 * the assistant's answer begins. For the turns of a conversation there is specache_session_prefill_chat.
 * SPECACHE_ERR_USAGE for messages that the template refuses and for a model without a template; _MODEL for a template that
 * fails or works for too long; _DEVICE if the system refuses the thread that it works on. */
int32_t specache_chat_prompt(specache_engine *engine, const specache_chat_message *messages, size_t n_messages,
                             int32_t add_generation_prompt, char *text, size_t capacity, size_t *n);

/* ---- sessions: one sequence of tokens each ---- */

/* Where K and V live and how a decode step reads them. */
enum {
    SPECACHE_KV_FULL = 0,     /* all at 16 bits on the device */
    SPECACHE_KV_KIVI = 1,     /* low-bit on the device, the last ones at 16 bits */
    SPECACHE_KV_OFFLOAD = 2,  /* all on the host; every layer comes back whole at every step */
    SPECACHE_KV_FETCH = 3,    /* low-bit on the device, 16-bit on the host: the top k come back while the token waits */
    SPECACHE_KV_SPECACHE = 4  /* the same, chosen one step ahead by a speculative token (default) */
};

/* Number type of K and V. */
enum {
    SPECACHE_DTYPE_AUTO = 0, /* the model's own (default) */
    SPECACHE_DTYPE_BF16 = 1,
    SPECACHE_DTYPE_FP16 = 2,
    SPECACHE_DTYPE_FP32 = 3 /* with SPECACHE_KV_FULL only */
};

typedef struct specache_kv_options {
    uint32_t struct_size;
    int32_t mode;          /* SPECACHE_KV_* */
    uint32_t bits;         /* of a low-bit code: 1, 2 (default), 4 */
    uint32_t group_size;   /* values that share a zero and a scale: 32, 64 (default); divides head_dim */
    uint32_t residual_len; /* latest tokens that stay at 16 bits on the device: at least 32; 64 by default */
    uint32_t top_k;        /* 16-bit pairs that come back per KV head; 64 by default */
    int32_t dtype;         /* SPECACHE_DTYPE_* */
} specache_kv_options;

/* As specache_engine_options_init.
 * SPECACHE_ERR_USAGE (NULL), _ABI. */
int32_t specache_kv_options_init(specache_kv_options *options, uint32_t struct_size);

typedef struct specache_memory_plan {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t packed_bytes;  /* device: low-bit pages */
    uint64_t wide_bytes;    /* device: 16-bit pages, the residual or everything */
    uint64_t slot_bytes;    /* device: prefetched pairs */
    uint64_t load_bytes;    /* device: whole layers that come back (SPECACHE_KV_OFFLOAD) */
    uint64_t device_bytes;  /* the four together: while decoding */
    uint64_t prefill_bytes; /* device: on top of it, while a prompt of max_tokens is prefilled */
    uint64_t host_bytes;    /* host: 16-bit copy */
    uint64_t weight_bytes;  /* device: the model's matrices, at 2 bytes a number (4 where config.json says float32) */
} specache_memory_plan;

/* What a session of these options and `max_tokens` tokens would take, without loading any weights: only config.json of `model`
 * (as in specache_engine_create) is read. `options` may be NULL.
 * SPECACHE_ERR_ABI, _MODEL, _FAILED (an unreadable file), _USAGE. */
int32_t specache_plan(uint32_t abi_version, const char *model, const specache_kv_options *options, uint64_t max_tokens,
                      specache_memory_plan *plan);

/* An empty session with room for `max_tokens` tokens, whose memory is set aside now. `options` may be NULL. *session is NULL
 * after a failure.
 * SPECACHE_ERR_HANDLE, _ABI, _USAGE for options that do not fit the model, _OUT_OF_MEMORY, _DEVICE. */
int32_t specache_session_create(specache_engine *engine, const specache_kv_options *options, uint64_t max_tokens,
                                specache_session **session);

/* Gives the session up. A call that is running goes on to its end: cancel it first to have it end soon. */
void specache_session_free(specache_session *session);

/* A second session with the same tokens, options, room and state of sampling, which goes its own way from here. 16-bit pages on
 * the host are shared, what lies on the device is copied. Its statistics begin anew. *fork is NULL after a failure.
 * SPECACHE_ERR_HANDLE, _BUSY, _OUT_OF_MEMORY, _DEVICE. */
int32_t specache_session_fork(specache_session *session, specache_session **fork);

/* Forgets the tokens from `n_tokens` on (1 to as many as there are), and a generated one that was not fed yet. Then feed a token
 * or a prompt: there are no logits.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE for more tokens than there are or none, and in SPECACHE_KV_KIVI for those whose 16-bit
 * form is gone; _OUT_OF_MEMORY where pages are shared; _DEVICE, with which the session has failed. */
int32_t specache_session_truncate(specache_session *session, uint64_t n_tokens);

/* Forgets everything: the session is as when it was created, with its options, its present room and its sampling options at
 * the start of their random sequence; a cancellation that nothing has heeded is forgotten too. The session keeps its memory. Of a
 * fork, pages that it shares are replaced: SPECACHE_ERR_OUT_OF_MEMORY if there are too few others, and nothing has changed.
 * Works on sessions that have failed, too. Those give their memory back and ask for it anew: where they do not get it, as somebody
 * else has taken it (_OUT_OF_MEMORY) or the GPU is lost (_DEVICE), they are empty and without memory until a reset succeeds.
 * SPECACHE_ERR_HANDLE, _BUSY, _OUT_OF_MEMORY, _DEVICE. */
int32_t specache_session_reset(specache_session *session);

/* Makes room for at least `max_tokens` tokens. Prefills make room by themselves, decoding does not.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE for more than the model or the library supports, _OUT_OF_MEMORY, _DEVICE. */
int32_t specache_session_reserve(specache_session *session, uint64_t max_tokens);

/* Stops the running prefill, generate or step of this session, on whatever thread, or the next one if none is running: it gives
 * SPECACHE_ERR_CANCELLED, and with that the request is over. The CPU heeds it within a layer of the model; a GPU between two
 * steps, and in a prompt within a layer. A prefill or step that is stopped leaves the session as it was, but that there are no
 * logits after a step that had begun; of a generation the tokens stay that were complete, and another call goes on from there.
 * SPECACHE_ERR_HANDLE. */
int32_t specache_session_cancel(specache_session *session);

/* Takes back a request to cancel that nothing has heeded yet.
 * SPECACHE_ERR_HANDLE. */
int32_t specache_session_clear_cancel(specache_session *session);

/* ---- from tokens to tokens ---- */

/* Adds tokens behind what the session holds, makes room for them if need be, and computes the logits of what follows. The last
 * token that specache_session_generate has shown is not fed yet, and goes in front; specache_session_truncate drops it.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE for nothing to add, ids beyond the vocabulary, or more tokens than are supported;
 * _OUT_OF_MEMORY; _CANCELLED; _FAILED and _DEVICE, with which the session has failed. */
int32_t specache_session_prefill(specache_session *session, const uint32_t *ids, size_t n_ids);

/* The same with a text of `n_bytes` bytes; flags as in specache_tokenize.
 * As specache_session_prefill, and as specache_tokenize. */
int32_t specache_session_prefill_text(specache_session *session, const char *text, size_t n_bytes, uint32_t flags);

/* A conversation up to where its next answer begins, by the model's chat template: all messages so far, each time. What the
 * session holds of it already stays, as a rule all of it, and only the rest is prefilled. Answers are to be the texts that
 * specache_session_generate has shown. Where they are not, or the template rewrites what was said before, the common beginning
 * stays; SPECACHE_KV_KIVI, which cannot go back, begins anew then. Statistics go on, also where nothing stays. How many tokens
 * stayed is returned in *n_kept, which may be NULL.
 * As specache_session_prefill, specache_tokenize and specache_chat_prompt. After _OUT_OF_MEMORY, _CANCELLED, _FAILED and _DEVICE
 * the session may hold the common beginning alone. */
int32_t specache_session_prefill_chat(specache_session *session, const specache_chat_message *messages, size_t n_messages,
                                      uint64_t *n_kept);

typedef struct specache_sampling_options {
    uint32_t struct_size;
    float temperature;    /* divides the logits; 0: take the most likely token */
    uint32_t top_k;       /* keep the k most likely tokens; 0: all */
    float top_p;          /* keep the most likely tokens that reach this probability together; 1: all */
    float min_p;          /* drop tokens below this share of the most likely one's probability; 0: none */
    float repeat_penalty; /* weakens tokens that the session holds; 1: off */
    uint64_t seed;        /* the same seed draws the same tokens */
} specache_sampling_options;

/* Sets struct_size and the defaults of the engine's model: those of its generation_config.json where that says do_sample, else
 * the most likely token.
 * SPECACHE_ERR_HANDLE, _USAGE (NULL), _ABI. */
int32_t specache_sampling_options_init(specache_engine *engine, specache_sampling_options *options, uint32_t struct_size);

/* How this session chooses tokens from now on, at the start of the seed's random sequence. NULL: the model's defaults, which
 * sessions begin with.
 * SPECACHE_ERR_HANDLE, _BUSY, _ABI, _USAGE naming what is out of range. */
int32_t specache_session_set_sampling(specache_session *session, const specache_sampling_options *options);

#define SPECACHE_NO_TOKEN UINT32_MAX

/* One generated token. Valid during the callback. */
typedef struct specache_token {
    uint32_t struct_size;
    uint32_t id;         /* SPECACHE_NO_TOKEN: no token, only the rest of the text */
    uint64_t index;      /* 0 for the first token of this call */
    const char *text;    /* the text that is complete with it, in whole UTF-8 characters, and a NUL; "" while a character is
                            incomplete, for tokens that end a text, and without a tokenizer */
    uint64_t n_bytes;    /* of text, without the NUL */
    uint32_t is_eos;     /* 1: the model ends its text here, heeded or not */
    uint32_t reserved;
} specache_token;

/* Receives tokens, on the thread that called. Non-zero stops the generation, which then gives SPECACHE_ERR_CANCELLED; the
 * session can go on from there. It may not use this session, except to cancel or to free it, and must return normally (THREADS):
 * no C++ exception, longjmp or pthread_exit may leave it. */
typedef int32_t (*specache_token_fn)(void *user_data, const specache_token *token);

/* Flags of specache_session_generate. */
#define SPECACHE_IGNORE_EOS 1u /* go on after a token that ends a text */
#define SPECACHE_NO_TEXT 2u    /* ids alone: saves the time of making text */

/* Why a generation came to its end. */
enum {
    SPECACHE_STOP_ERROR = -1, /* none: the call has failed */
    SPECACHE_STOP_LENGTH = 0, /* as many tokens as were asked for */
    SPECACHE_STOP_EOS = 1,    /* the model ended its text */
    SPECACHE_STOP_FULL = 2    /* the session has no room: specache_session_reserve */
};

/* Generates up to `n_tokens` tokens, beginning with what follows the last prefill, step or generate. `on_token` may be NULL. The
 * number of tokens and the reason for the end (SPECACHE_STOP_*) are returned in *n_generated and *stop, either of which may be
 * NULL. After a failure half way *n_generated is right too, and what was generated until then stays. The last token is shown,
 * and fed by whatever comes next: generate, a prefill; or specache_session_step and specache_step_batch, if they are given it.
 * If a call ends within a character, its bytes come as U+FFFD with SPECACHE_NO_TOKEN at the end.
 * On a GPU tokens are drawn there, with weights in fp32, as in specache_step_batch; specache_session_sample draws on the host, in
 * fp64, and so does this function where it begins with what follows a prefill or a step: where the random number falls within a
 * millionth of a border, the same seed gives another token.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE for an empty session; _CANCELLED; _FAILED and _DEVICE as in prefill; _MODEL as in
 * specache_detokenize; on a GPU _OUT_OF_MEMORY if there is no room for what calls work in, which grows with how many run at
 * once. */
int32_t specache_session_generate(specache_session *session, uint64_t n_tokens, uint32_t flags, specache_token_fn on_token,
                                  void *user_data, uint64_t *n_generated, int32_t *stop);

/* One decode step: feeds `token` and computes the logits of what follows, which go to `logits` too if that is not NULL.
 * `n_logits` must be vocab_size then, else 0. Logits that nobody asks for stay where they are, on a GPU in its memory, until
 * another call needs the place.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE for a session that is empty or full, or an id beyond the vocabulary;
 * _CANCELLED, _FAILED, _DEVICE as in prefill; _OUT_OF_MEMORY as in specache_session_generate. After _OUT_OF_MEMORY, and
 * _CANCELLED in the middle of the step, the session holds what it held, and there are no logits. */
int32_t specache_session_step(specache_session *session, uint32_t token, float *logits, size_t n_logits);

/* The logits [vocab_size] of what follows the session's last token, from its last prefill, step, batched step or generate.
 * SPECACHE_ERR_HANDLE, _BUSY, _BUFFER, _USAGE if there are none: in an empty session, after specache_session_truncate, and
 * after a step, batched or of a generation, that began and failed; _DEVICE if a GPU has them and fails. */
int32_t specache_session_logits(specache_session *session, float *logits, size_t capacity, size_t *n);

/* Chooses a token from these logits with the session's sampling options. The session does not remember it: give it to
 * specache_session_step, or do not. specache_session_generate, called next, chooses itself, one further in the random sequence.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE and _DEVICE as in specache_session_logits. */
int32_t specache_session_sample(specache_session *session, uint32_t *token);

/* One sequence of a batched step. */
typedef struct specache_step {
    specache_session *session;
    float *logits;     /* out: [vocab_size], or NULL */
    uint64_t n_logits; /* vocab_size, or 0 if logits is NULL */
    uint32_t token;    /* in: the token to feed */
    uint32_t next;     /* out: what specache_session_sample gives then, else SPECACHE_NO_TOKEN */
    int32_t status;    /* out: of this sequence; where the call is refused as a whole, its status */
    uint32_t reserved;
} specache_step;

/* A decode step of several sessions of one engine at once, which reads the weights once for all of them. A sequence that fails,
 * or is busy, does not disturb the others; each has its own status. Returns the first status that is not SPECACHE_OK;
 * specache_last_error names all of them. `step_size` is sizeof(specache_step). A session may be in a batch once.
 * Results are the same as from single steps, bit for bit, on the CPU, and on a GPU with SPECACHE_LINEAR_FUSED, or up to 8 rows
 * (SPECACHE_KV_SPECACHE has two for each sequence, the other modes one). With more rows, SPECACHE_LINEAR_AUTO changes over to
 * cuBLASLt, and the last bits may differ.
 * Of a step: as specache_session_step. Of the call: SPECACHE_ERR_ABI (step_size), _USAGE (NULL; sessions of two engines). */
int32_t specache_step_batch(specache_step *steps, size_t n_steps, size_t step_size);

/* The tokens that the session holds, without one that was generated and not fed yet.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE (NULL), _BUFFER. */
int32_t specache_session_tokens(specache_session *session, uint32_t *ids, size_t capacity, size_t *n);

/* ---- statistics ---- */

typedef struct specache_session_stats {
    uint32_t struct_size;
    uint32_t n_layers;
    uint64_t n_tokens;          /* that the session holds */
    uint64_t max_tokens;        /* that it has room for */
    uint64_t steps;             /* decode steps */
    double hit_rate;            /* share of each step's own top k that had been prefetched; NaN: nothing to count */
    double acceptance;          /* share of speculative tokens that were right; NaN: nothing to count */
    uint64_t accepted;          /* of `compared` speculative tokens */
    uint64_t compared;
    uint64_t fetched_bytes;     /* host to device, in decode steps */
    uint64_t pre_decode_bytes;  /* host to device, once per prefill */
    uint64_t offloaded_bytes;   /* device to host, prefills included */
    uint64_t exposed_ns;        /* time that exposed_steps waited for copies */
    uint64_t packed_bytes;      /* memory, as in specache_memory_plan */
    uint64_t wide_bytes;
    uint64_t slot_bytes;
    uint64_t load_bytes;
    uint64_t host_bytes;        /* the room for 16-bit pages; of forks, those that they share count for each of them */
    uint64_t exposed_steps;     /* decode steps whose waiting was measured: on the CPU all, on a GPU while
                                   specache_engine_measure_waits is on */
} specache_session_stats;

/* Fills *stats: since the session was created or reset.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE (NULL), _ABI. */
int32_t specache_session_get_stats(specache_session *session, specache_session_stats *stats);

/* One layer's pairs. The hit rate is hits / hits_of. */
typedef struct specache_layer_stats {
    uint64_t hits;     /* pairs of the steps' own top k that had been prefetched */
    uint64_t hits_of;  /* pairs of those top k */
    uint64_t fetched;  /* pairs that were copied from the host */
    uint64_t selected; /* pairs that were selected; those not fetched were still in their slots */
} specache_layer_stats;

/* One entry per layer.
 * SPECACHE_ERR_HANDLE, _BUSY, _USAGE (NULL), _BUFFER. */
int32_t specache_session_layer_stats(specache_session *session, specache_layer_stats *layers, size_t capacity, size_t *n);

#ifdef __cplusplus
}
#endif

#endif /* SPECACHE_H */
