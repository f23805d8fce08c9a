/* The board server: gives one machine to TVM's RPC clients, one session at a time, without Python. */
#ifndef AGQ_BOARD_H
#define AGQ_BOARD_H

#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

#define RPC_MAGIC 0xFF271
#define RPC_MISMATCH (RPC_MAGIC + 2)
#define TRACKER_MAGIC 0x2F271
#define KEY_SIZE 128 /* a key with its random part */
#define USER_SIZE 64 /* who a client says that it is */
/* Characters that need no escape in JSON. */
#define PLAIN "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:_-"

struct options {
  const char *key;          /* what clients ask the tracker for */
  const char *host;         /* address to listen on */
  const char *custom_addr;  /* address that clients are told, or NULL: the one that the tracker sees */
  const char *tracker_host; /* NULL: no tracker */
  const char *tracker_port;
  int port;     /* port to listen on; once listening, the real one */
  const char *cache;        /* folder of files that outlive sessions, or NULL: ~/.cache/agq-board */
  uint64_t cache_limit;     /* its size in bytes */
  int emulated; /* whether this is no real board, so that its time means nothing */
};

/* net.c: all return 0, or -1 after an error, a time-out or the end of the stream. */
int read_all(int socket, void *data, size_t size);
int write_all(int socket, const void *data, size_t size);
int read_int(int socket, int32_t *value);
int write_int(int socket, int32_t value);
void set_time_limit(int socket, int seconds); /* 0: none */
void random_key(const char *key, char result[KEY_SIZE]);
int listen_on(struct options *options);

/* tracker.c: the tracker's protocol (tvm/rpc/tracker.py). */
int tracker_connect(const struct options *options); /* a socket, or -1 */
int tracker_offer(int tracker, const struct options *options, const char *match_key);
int tracker_tell_user(int tracker, const struct options *options, const char *user); /* NULL: the board is free */
int tracker_holds(int tracker, const char *match_key); /* 1: nobody has asked for it yet; 0: somebody has */

/* session.c */
int session_accept(int connection, const char *key, const char *match_key, double *time_limit,
                   char user[USER_SIZE]);
int session_run(int connection, double time_limit, int signals, int emulated); /* 1: told to stop */

/* status.c: agq.board.status, as JSON. */
void status_text(const char *folder, char *text, size_t size);

/* sha256.c */
struct sha256 {
  uint32_t state[8];
  uint64_t size;
  unsigned char block[64];
};
void sha256_begin(struct sha256 *hash);
void sha256_add(struct sha256 *hash, const void *data, size_t size);
void sha256_end(struct sha256 *hash, char digits[65]);

/* cache.c: files that are sent once. */
void cache_configure(const char *folder, uint64_t limit);
int register_cache(void);

/* operations.c: times of the functions of a model. */
int register_operations(void);

/* functions.c: what a session offers beside TVM's runtime. */
int register_functions(const char *folder, int emulated);
const char *line_of(const char *path, char *line, size_t size); /* the first line of a file; "" if there is none */
int set_function(const char *name, TVMFFISafeCallType call);
int return_text(const char *text, TVMFFIAny *result);
/* Copies a text argument; fails if there is none or it is too long. */
int text_argument(const TVMFFIAny *arguments, int32_t count, char *text, size_t size);
int call_runtime(const char *name, int socket, const char *message); /* message may be NULL */

#endif
