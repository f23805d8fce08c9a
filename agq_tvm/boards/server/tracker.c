/* The client's side of TVM's tracker: a length, then JSON, answered in the same way. */
#include "board.h"

#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PUT = 3, UPDATE_INFO = 5, GET_PENDING_MATCHKEYS = 7 };

#define ANSWER_SIZE 65536

/* Sends one request and reads its answer, a text that ends in NUL. */
static int ask(int tracker, const char *request, char answer[ANSWER_SIZE]) {
  int32_t size = (int32_t)strlen(request);
  if (write_int(tracker, size) || write_all(tracker, request, (size_t)size)) return -1;
  if (read_int(tracker, &size) || size < 0 || size >= ANSWER_SIZE) return -1;
  if (read_all(tracker, answer, (size_t)size)) return -1;
  answer[size] = 0;
  return 0;
}

/* Sends a request whose answer must be 0 (success). */
static int tell(int tracker, const char *request) {
  static char answer[ANSWER_SIZE];
  return ask(tracker, request, answer) || strcmp(answer, "0") ? -1 : 0;
}

/* The address as JSON. */
static const char *address(const struct options *options, char text[KEY_SIZE + 2]) {
  if (!options->custom_addr) return "null";
  snprintf(text, KEY_SIZE + 2, "\"%s\"", options->custom_addr);
  return text;
}

/* The tracker gives what it is told of a board to whoever asks for its summary. */
int tracker_tell_user(int tracker, const struct options *options, const char *user) {
  char text[KEY_SIZE + 2], busy[128] = "null", request[512];
  if (user)
    snprintf(busy, sizeof busy, "{\"user\": \"%s\", \"since\": %lld}", user, (long long)time(NULL));
  snprintf(request, sizeof request, "[%d, {\"key\": \"server:%s\", \"addr\": [%s, %d], \"busy\": %s}]",
           UPDATE_INFO, options->key, address(options, text), options->port, busy);
  return tell(tracker, request);
}

static int introduce(int tracker, const struct options *options) {
  int32_t magic;
  if (write_int(tracker, TRACKER_MAGIC) || read_int(tracker, &magic) || magic != TRACKER_MAGIC) return -1;
  return tracker_tell_user(tracker, options, NULL);
}

int tracker_connect(const struct options *options) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *addresses;
  if (getaddrinfo(options->tracker_host, options->tracker_port, &hints, &addresses)) return -1;
  int tracker = -1;
  for (struct addrinfo *one = addresses; one && tracker < 0; one = one->ai_next) {
    tracker = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (tracker < 0) continue;
    set_time_limit(tracker, 10);
    if (connect(tracker, one->ai_addr, one->ai_addrlen) || introduce(tracker, options)) {
      close(tracker);
      tracker = -1;
    }
  }
  freeaddrinfo(addresses);
  return tracker;
}

int tracker_offer(int tracker, const struct options *options, const char *match_key) {
  char text[KEY_SIZE + 2], request[512];
  snprintf(request, sizeof request, "[%d, \"%s\", [%d, \"%s\"], %s]", PUT, options->key, options->port,
           match_key, address(options, text));
  return tell(tracker, request);
}

int tracker_holds(int tracker, const char *match_key) {
  static char answer[ANSWER_SIZE];
  char request[16], quoted[KEY_SIZE + 2];
  snprintf(request, sizeof request, "[%d]", GET_PENDING_MATCHKEYS);
  if (ask(tracker, request, answer)) return -1;
  snprintf(quoted, sizeof quoted, "\"%s\"", match_key);
  return strstr(answer, quoted) != NULL;
}
