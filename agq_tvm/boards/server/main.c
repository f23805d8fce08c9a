/* The board server's arguments and its loop: offer the board to the tracker, accept a client, serve it. */
#define _GNU_SOURCE
#include "board.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PING_SECONDS = 2, RETRY_SECONDS = 1, PINGS_UNTIL_NEW_KEY = 3 };

struct board {
  struct options options;
  int server, signals, tracker; /* tracker is -1 while there is no connection */
  char match_key[KEY_SIZE];
  int asked_for; /* pings since somebody asked for the match key without coming */
  int told;      /* whether it was said that there is no tracker */
};

static void fail(const char *what, const char *value) {
  fprintf(stderr, "board-server: %s%s\n", what, value);
  fprintf(stderr, "usage: board-server --key KEY [--tracker HOST:PORT] [--host 127.0.0.1] [--port 0] "
                  "[--custom-addr ADDRESS] [--cache FOLDER] [--cache-megabytes 8000] [--emulated]\n");
  exit(2);
}

/* Keys and addresses go into JSON as they are, so they may only have characters that need no escape. */
static const char *plain(const char *value) {
  size_t length = strlen(value);
  if (!length || length > 64 || strspn(value, PLAIN) != length)
    fail("letters, digits and any of .:_- are allowed, at most 64, not ", value);
  return value;
}

static int port_number(const char *text) {
  char *end;
  long port = strtol(text, &end, 10);
  if (end == text || *end || port < 0 || port > 65535) fail("not a port: ", text);
  return (int)port;
}

static uint64_t megabytes(const char *text) {
  char *end;
  unsigned long count = strtoul(text, &end, 10);
  if (!*text || *end || strlen(text) > 9) fail("not a number of megabytes: ", text);
  return 1000000ull * count;
}

static struct options parse(int count, char **arguments) {
  struct options options = {.host = "127.0.0.1", .cache_limit = 8000000000};
  for (int i = 1; i < count; i += 2) {
    const char *name = arguments[i];
    char *value = i + 1 < count ? arguments[i + 1] : NULL;
    if (!strcmp(name, "--emulated")) {
      options.emulated = 1;
      --i; /* it has no value */
      continue;
    }
    if (!value) fail("a value is missing after ", name);
    if (!strcmp(name, "--key")) {
      options.key = plain(value);
    } else if (!strcmp(name, "--host")) {
      options.host = plain(value);
    } else if (!strcmp(name, "--custom-addr")) {
      options.custom_addr = plain(value);
    } else if (!strcmp(name, "--port")) {
      options.port = port_number(value);
    } else if (!strcmp(name, "--cache")) {
      options.cache = value;
    } else if (!strcmp(name, "--cache-megabytes")) {
      options.cache_limit = megabytes(value);
    } else if (!strcmp(name, "--tracker")) {
      char *colon = strrchr(value, ':');
      if (!colon || colon == value || !port_number(colon + 1))
        fail("--tracker must be HOST:PORT, not ", value);
      *colon = 0;
      options.tracker_host = value;
      options.tracker_port = colon + 1;
    } else {
      fail("unknown argument ", name);
    }
  }
  if (!options.key) fail("--key is missing", "");
  return options;
}

static int open_signals(void) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigprocmask(SIG_BLOCK, &set, NULL);
  return signalfd(-1, &set, SFD_CLOEXEC);
}

static void lose_tracker(struct board *board) {
  printf("lost the tracker %s:%s\n", board->options.tracker_host, board->options.tracker_port);
  close(board->tracker);
  board->tracker = -1;
}

/* Puts a new key into the tracker's queue. */
static void offer(struct board *board) {
  random_key(board->options.key, board->match_key);
  board->asked_for = 0;
  if (tracker_offer(board->tracker, &board->options, board->match_key)) lose_tracker(board);
}

static void find_tracker(struct board *board) {
  board->tracker = tracker_connect(&board->options);
  if (board->tracker < 0) {
    if (!board->told)
      printf("no tracker at %s:%s yet: trying on\n", board->options.tracker_host,
             board->options.tracker_port);
    board->told = 1;
    return;
  }
  board->told = 0;
  printf("registered with the tracker %s:%s\n", board->options.tracker_host, board->options.tracker_port);
  offer(board);
}

/* A client that got the key may have died on its way here: then the key is given up for a new one. */
static void ping(struct board *board) {
  int held = tracker_holds(board->tracker, board->match_key);
  if (held < 0)
    lose_tracker(board);
  else if (held)
    board->asked_for = 0;
  else if (++board->asked_for > PINGS_UNTIL_NEW_KEY)
    offer(board);
}

/* Returns 1 if the board was told to stop during the session. */
static int serve_one(struct board *board) {
  int connection = accept4(board->server, NULL, NULL, SOCK_CLOEXEC), stop = 0;
  if (connection < 0) return 0;
  double time_limit;
  char user[USER_SIZE];
  if (session_accept(connection, board->options.key, board->match_key, &time_limit, user)) {
    printf("refused a client with a wrong key\n");
    close(connection);
    return 0;
  }
  printf("session begins\n");
  if (board->tracker >= 0) tracker_tell_user(board->tracker, &board->options, user);
  stop = session_run(connection, time_limit, board->signals, board->options.emulated);
  close(connection);
  printf("session ended\n");
  if (board->tracker >= 0) tracker_tell_user(board->tracker, &board->options, NULL);
  if (board->tracker >= 0) offer(board);
  return stop;
}

static void run(struct board *board) {
  for (;;) {
    int wants_tracker = board->options.tracker_host && board->tracker < 0;
    if (wants_tracker) find_tracker(board);
    int seconds = board->tracker >= 0 ? PING_SECONDS : RETRY_SECONDS;
    struct pollfd events[] = {{.fd = board->signals, .events = POLLIN},
                              {.fd = board->server, .events = POLLIN},
                              {.fd = board->tracker, .events = POLLIN}};
    int count = poll(events, 3, seconds * 1000);
    if (events[0].revents) {
      struct signalfd_siginfo signal;
      ssize_t size = read(board->signals, &signal, sizeof signal);
      if (size == sizeof signal && signal.ssi_signo != SIGCHLD) return;
    } else if (events[1].revents) {
      if (serve_one(board)) return;
    } else if (events[2].revents) {
      lose_tracker(board); /* it never speaks first: this is the end of the connection */
    } else if (count == 0 && board->tracker >= 0) {
      ping(board);
    }
  }
}

int main(int count, char **arguments) {
  struct board board = {.options = parse(count, arguments), .tracker = -1};
  struct rlimit no_core = {0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  setvbuf(stdout, NULL, _IOLBF, 0);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN); /* a file that gets too large is an error of its write */
  cache_configure(board.options.cache, board.options.cache_limit);
  board.signals = open_signals();
  board.server = listen_on(&board.options);
  if (board.server < 0 || board.signals < 0) return 1;
  snprintf(board.match_key, sizeof board.match_key, "%s", board.options.key);
  printf("listening on %s port %d\n", board.options.host, board.options.port);
  run(&board);
  printf("stopped\n");
  return 0;
}
