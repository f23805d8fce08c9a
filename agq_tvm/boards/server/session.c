/* One client: the handshake, then a forked child that serves it in a folder of its own. */
#define _GNU_SOURCE
#include "board.h"

#include <ftw.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RUNNING, ENDED, EXPIRED, STOPPED };

/* Copies the value of an option, " -NAME=VALUE", as far as its characters need no escape in JSON. */
static void option_text(const char *options, const char *name, char *value, size_t size) {
  const char *found = strstr(options, name);
  size_t length = found ? strspn(found + strlen(name), PLAIN "@") : 0;
  if (length >= size) length = size - 1;
  if (found) memcpy(value, found + strlen(name), length);
  value[length] = 0;
}

/* Checks the client's key ("client:KEY:RANDOM [-user=NAME] [-timeout=SECONDS]") and answers it. */
int session_accept(int connection, const char *key, const char *match_key, double *time_limit,
                   char user[USER_SIZE]) {
  int32_t magic, size;
  char asked[512], expected[KEY_SIZE + 16], own[KEY_SIZE + 16];
  set_time_limit(connection, 5);
  if (read_int(connection, &magic) || magic != RPC_MAGIC) return -1;
  if (read_int(connection, &size) || size < 1 || size >= (int32_t)sizeof asked) return -1;
  if (read_all(connection, asked, (size_t)size)) return -1;
  asked[size] = 0;

  const char *limit = strstr(asked, " -timeout=");
  *time_limit = limit ? strtod(limit + strlen(" -timeout="), NULL) : 0;
  if (!isfinite(*time_limit) || *time_limit < 0) *time_limit = 0;
  option_text(asked, " -user=", user, USER_SIZE);
  asked[strcspn(asked, " ")] = 0;
  snprintf(expected, sizeof expected, "client:%s", match_key);
  if (strcmp(asked, expected)) {
    write_int(connection, RPC_MISMATCH);
    return -1;
  }
  int length = snprintf(own, sizeof own, "server:%s", key);
  if (write_int(connection, RPC_MAGIC) || write_int(connection, length)) return -1;
  if (write_all(connection, own, (size_t)length)) return -1;
  int yes = 1;
  setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  setsockopt(connection, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof yes);
  set_time_limit(connection, 0);
  return 0;
}

static int remove_one(const char *path, const struct stat *status, int kind, struct FTW *place) {
  (void)status, (void)kind, (void)place;
  return remove(path);
}

/* How often a thread without work looks for some before it sleeps, as in agq_tvm/runtime/threads.py. */
#define SPINS "50"

/* The child: never returns. */
static void serve(int connection, const char *folder, int emulated) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", SPINS, 0);
  int failed = chdir(folder) || register_functions(folder, emulated) ||
               call_runtime("rpc.ServerLoop", connection, NULL);
  fflush(NULL);
  _exit(failed ? 1 : 0);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Waits for the child's end, its time limit (0: none) or a signal to stop. */
static int wait_for(pid_t child, double time_limit, int signals, int *status) {
  double end = now() + time_limit;
  for (;;) {
    if (waitpid(child, status, WNOHANG) == child) return ENDED;
    double left = time_limit > 0 ? end - now() : 1;
    if (left <= 0) return EXPIRED;
    struct pollfd event = {.fd = signals, .events = POLLIN};
    if (poll(&event, 1, left < 1 ? (int)(left * 1000) + 1 : 1000) <= 0) continue;
    struct signalfd_siginfo signal;
    if (read(signals, &signal, sizeof signal) != sizeof signal) continue;
    if (signal.ssi_signo != SIGCHLD) return STOPPED;
  }
}

/* Reads what the client still sends, for a second at most: closing a socket that holds unread bytes resets
 * the connection, and the client may lose the text that was just sent to it. */
static void drain(int connection) {
  char unread[4096];
  double end = now() + 1;
  shutdown(connection, SHUT_WR);
  for (double left = 1; left > 0; left = end - now()) {
    struct pollfd event = {.fd = connection, .events = POLLIN};
    if (poll(&event, 1, (int)(left * 1000) + 1) <= 0) return;
    if (read(connection, unread, sizeof unread) <= 0) return;
  }
}

/* Tells the client why its session is over; its pending call fails with this text. */
static void tell_end(int connection, int how, int status, double time_limit) {
  char text[200] = "";
  if (how == EXPIRED)
    snprintf(text, sizeof text, "RPCSessionTimeoutError: Your %gs session has expired, %s", time_limit,
             "try to increase the \"session_timeout\" value.");
  else if (how == STOPPED)
    snprintf(text, sizeof text, "the board was stopped");
  else if (WIFSIGNALED(status))
    snprintf(text, sizeof text, "the session on the board was ended by signal %d (%s)",
             WTERMSIG(status), strsignal(WTERMSIG(status)));
  else if (WEXITSTATUS(status))
    snprintf(text, sizeof text, "the session on the board ended with code %d", WEXITSTATUS(status));
  if (!*text) return;
  printf("%s\n", text);
  set_time_limit(connection, 5);
  call_runtime("rpc.ReturnException", connection, text);
  drain(connection);
}

int session_run(int connection, double time_limit, int signals, int emulated) {
  const char *root = getenv("TMPDIR");
  char folder[256];
  snprintf(folder, sizeof folder, "%s/agq-board-XXXXXX", root && *root ? root : "/tmp");
  if (!mkdtemp(folder)) {
    call_runtime("rpc.ReturnException", connection, "the board cannot make a folder for the session");
    return 0;
  }
  fflush(NULL);
  pid_t child = fork();
  if (child == 0) serve(connection, folder, emulated);
  if (child < 0) call_runtime("rpc.ReturnException", connection, "the board cannot start a process");
  int status = 0, how = ENDED;
  if (child > 0) {
    how = wait_for(child, time_limit, signals, &status);
    if (how != ENDED) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
    }
    tell_end(connection, how, status, time_limit);
  }
  nftw(folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
  return how == STOPPED;
}
