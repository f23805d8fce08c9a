/* Sockets: whole reads and writes, and the little-endian integers of TVM's protocols. */
#include "board.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

int read_all(int socket, void *data, size_t size) {
  char *next = data;
  while (size) {
    ssize_t count = recv(socket, next, size, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return -1;
    next += count;
    size -= (size_t)count;
  }
  return 0;
}

int write_all(int socket, const void *data, size_t size) {
  const char *next = data;
  while (size) {
    ssize_t count = send(socket, next, size, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return -1;
    next += count;
    size -= (size_t)count;
  }
  return 0;
}

/* Every machine that this runs on is little-endian, as the protocols are. */
int read_int(int socket, int32_t *value) { return read_all(socket, value, sizeof *value); }

int write_int(int socket, int32_t value) { return write_all(socket, &value, sizeof value); }

void set_time_limit(int socket, int seconds) {
  struct timeval limit = {.tv_sec = seconds};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

void random_key(const char *key, char result[KEY_SIZE]) {
  uint64_t number = 0;
  if (getrandom(&number, sizeof number, 0) != sizeof number) number = (uint64_t)getpid();
  snprintf(result, KEY_SIZE, "%s:%016llx", key, (unsigned long long)number);
}

int listen_on(struct options *options) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *addresses;
  char port[16];
  snprintf(port, sizeof port, "%d", options->port);
  int error = getaddrinfo(options->host, port, &hints, &addresses);
  if (error) {
    fprintf(stderr, "cannot listen on %s: %s\n", options->host, gai_strerror(error));
    return -1;
  }
  int server = socket(addresses->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
  setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  error = bind(server, addresses->ai_addr, addresses->ai_addrlen) || listen(server, 8);
  freeaddrinfo(addresses);
  struct sockaddr_storage bound;
  socklen_t size = sizeof bound;
  if (error || getsockname(server, (struct sockaddr *)&bound, &size)) {
    fprintf(stderr, "cannot listen on %s port %d: %s\n", options->host, options->port, strerror(errno));
    return -1;
  }
  options->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                    : ((struct sockaddr_in *)&bound)->sin_port);
  return server;
}
