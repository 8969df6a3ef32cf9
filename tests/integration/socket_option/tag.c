/* Connects, says which trace the connection serves, sends a line, and prints what setsockopt and the peer answered.
 *
 *     tag HOST PORT TRACE_ID SPAN_ID [NAME]
 *
 * The ids are hexadecimal as in a traceparent. NAME is 1, or 2 for a context that shares the connection. The first
 * line printed is setsockopt's errno, 0 where an agent took the tag; the second is the peer's answer.
 */
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define OTEL_LEVEL 0x6f74656c /* "otel" */

/* Reads `count` bytes of hexadecimal; -1 where the text is anything else. */
static int parse_hexadecimal(const char *text, unsigned char *bytes, size_t count)
{
	if (strlen(text) != 2 * count || strspn(text, "0123456789abcdef") != 2 * count)
		return -1;
	for (size_t i = 0; i < count; i++)
		sscanf(text + 2 * i, "%2hhx", &bytes[i]);
	return 0;
}

static int connect_to(const char *host, const char *port)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found;
	int fd = -1;

	if (getaddrinfo(host, port, &hints, &found))
		return -1;
	for (struct addrinfo *next = found; next && fd < 0; next = next->ai_next) {
		fd = socket(next->ai_family, next->ai_socktype, next->ai_protocol);
		if (fd >= 0 && connect(fd, next->ai_addr, next->ai_addrlen)) {
			close(fd);
			fd = -1;
		}
	}
	freeaddrinfo(found);
	return fd;
}

int main(int argc, char **argv)
{
	static const char line[] = "hello\n";
	unsigned char context[24];
	char answer[4096];
	ssize_t size = 0, more;
	int fd, name = argc > 5 ? atoi(argv[5]) : 1;

	if (argc < 5 || parse_hexadecimal(argv[3], context, 16) || parse_hexadecimal(argv[4], context + 16, 8)) {
		fprintf(stderr, "usage: %s HOST PORT TRACE_ID SPAN_ID [NAME]\n", argv[0]);
		return 2;
	}
	fd = connect_to(argv[1], argv[2]);
	if (fd < 0) {
		perror("connect");
		return 1;
	}
	printf("%d\n", setsockopt(fd, OTEL_LEVEL, name, context, sizeof(context)) ? errno : 0);

	if (write(fd, line, sizeof(line) - 1) != (ssize_t)sizeof(line) - 1) {
		perror("write");
		return 1;
	}
	do {
		more = read(fd, answer + size, sizeof(answer) - size);
		size += more > 0 ? more : 0;
	} while (more > 0 && size < (ssize_t)sizeof(answer) && !memchr(answer, '\n', size));
	fwrite(answer, 1, size, stdout);
	close(fd);
	return 0;
}
