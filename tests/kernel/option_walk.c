/* Sets every option of every kind of socket, each on a socket of its own, and prints what the kernel answered.
 *
 *     option_walk whole|short
 *
 * A line for each call: socket, level, name, length and value; then setsockopt's errno, getsockopt's errno and length,
 * and the value that it shows. `whole` gives values as long as is said; `short` gives pointers that lead nowhere, or to
 * fewer bytes than is said.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof(*(array)))
#define NAMES 101
#define FEW 5
#define LONGEST 65536
#define PAGE 4096
#define OURS 0x6f74656c

static const struct kind {
	const char *name;
	int family, type, connected;
} kinds[] = {
	{ "tcp4", AF_INET, SOCK_STREAM, 0 },  { "tcp6", AF_INET6, SOCK_STREAM, 0 },
	{ "udp4", AF_INET, SOCK_DGRAM, 0 },   { "udp6", AF_INET6, SOCK_DGRAM, 0 },
	{ "tcp4c", AF_INET, SOCK_STREAM, 1 }, { "tcp6c", AF_INET6, SOCK_STREAM, 1 },
};

/* SOL_SOCKET, the protocols', MPTCP's, TLS's, ours and its neighbour, and one that nobody has. `text` is a value that
 * makes sense to some option of the level: a device, a multicast group and where to join it, an algorithm. */
static const struct level {
	int number;
	char text[8];
} levels[] = {
	{ SOL_SOCKET, "lo" },	 { IPPROTO_IP, { '\340', 0, 0, 1, 127, 0, 0, 1 } },
	{ IPPROTO_TCP, "reno" }, { IPPROTO_UDP, "\2" },
	{ IPPROTO_IPV6, "\2" },	 { .number = 255 },
	{ .number = 282 },	 { .number = 284 },
	{ .number = OURS },	 { .number = OURS + 1 },
	{ .number = 12345 },
};

static const int lengths[] = { 0, 4, 8, 24, 4096, 4097, 1, 12, 16, 20, 5000, LONGEST };

/* So many of them will do where all take too long. */
#define SOME 6

static int listeners[2];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Loopback's address; port 0, or that of the listener. */
static socklen_t loopback(int family, struct sockaddr_in6 *address)
{
	struct sockaddr_in *four = (struct sockaddr_in *)address;

	memset(address, 0, sizeof(*address));
	address->sin6_family = family;
	if (family == AF_INET6) {
		address->sin6_addr = in6addr_loopback;
		return sizeof(*address);
	}
	four->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return sizeof(*four);
}

static int listening(int family)
{
	struct sockaddr_in6 address;
	socklen_t size = loopback(family, &address);
	int fd = socket(family, SOCK_STREAM, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 16))
		die("listen");
	return fd;
}

/* A new socket; `accepted` is the other end of its connection, -1 where it has none. */
static int make(const struct kind *kind, int *accepted)
{
	int fd = socket(kind->family, kind->type, 0), listener = listeners[kind->family == AF_INET6];
	struct sockaddr_in6 address;
	socklen_t size = sizeof(address);

	*accepted = -1;
	if (fd < 0)
		die("socket");
	if (!kind->connected)
		return fd;
	if (getsockname(listener, (struct sockaddr *)&address, &size) || connect(fd, (struct sockaddr *)&address, size))
		die("connect");
	*accepted = accept(listener, NULL, NULL);
	if (*accepted < 0)
		die("accept");
	return fd;
}

/* Has this kind of socket options at this level? Where it has none, the name makes no difference. */
static int has_options(const struct kind *kind, int level)
{
	switch (level) {
	case SOL_SOCKET:
	case IPPROTO_IP:
		return 1;
	case IPPROTO_TCP:
		return kind->type == SOCK_STREAM;
	case IPPROTO_UDP:
		return kind->type == SOCK_DGRAM;
	case IPPROTO_IPV6:
		return kind->family == AF_INET6;
	}
	return 0;
}

/* Does the kernel start a process, looking for a module of the name that it is given? That takes long, and ends the
 * same. */
static int starts_modprobe(int level, int name, const char *what)
{
	return level == IPPROTO_TCP &&
	       (name == TCP_ULP ||
		(name == TCP_CONGESTION && (!strcmp(what, "one") || !strcmp(what, "zeros") || !strcmp(what, "ones"))));
}

static void try(const struct kind *kind, int level, int name, int length, const char *what, const void *value)
{
	static const struct linger now = { .l_onoff = 1 };
	unsigned char shown[256];
	socklen_t size = sizeof(shown);
	int accepted, fd, set, got;

	if (starts_modprobe(level, name, what))
		return;
	fd = make(kind, &accepted);
	set = setsockopt(fd, level, name, value, length) ? errno : 0;
	memset(shown, 0, sizeof(shown));
	got = getsockopt(fd, level, name, shown, &size) ? errno : 0;
	printf("%s %d %d %d %s %d %d %u ", kind->name, level, name, length, what, set, got, got ? 0 : size);
	for (socklen_t i = 0; !got && i < size && i < sizeof(shown); i++)
		printf("%02x", shown[i]);
	putchar('\n');
	if (accepted >= 0) { /* a reset: nothing stays in TIME_WAIT */
		setsockopt(accepted, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
		close(accepted);
	}
	close(fd);
}

/* A one of every length; zeros, all bits and the level's text of some. Fewer where a walk over IPv4 has been there, and
 * of connections, which take long to make. */
static void walk_whole(const struct kind *kind, const struct level *level, int name)
{
	enum { ONE, ZEROS, ONES, TEXT };
	static const char *const what[] = { "one", "zeros", "ones", "text" };
	static unsigned char buffer[LONGEST];
	int repeats = kind->family == AF_INET6 && level->number != IPPROTO_IPV6;

	if (kind->connected && level->number != OURS && !has_options(kind, level->number))
		return;
	for (int value = ONE; value <= TEXT; value++) {
		int all = value == ONE && !repeats && !kind->connected;

		if (value == TEXT && (repeats || kind->connected))
			return;
		memset(buffer, value == ONES ? 0xff : 0, sizeof(buffer));
		if (value == ONE)
			buffer[0] = 1;
		if (value == TEXT)
			memcpy(buffer, level->text, sizeof(level->text));
		for (size_t i = 0; i < (all ? COUNT(lengths) : SOME); i++)
			try(kind, level->number, name, lengths[i], what[value], buffer);
	}
}

static void walk_short(const struct kind *kind, const struct level *level, int name, unsigned char *page)
{
	for (size_t i = 1; i < SOME; i++) {
		try(kind, level->number, name, lengths[i], "null", NULL);
		try(kind, level->number, name, lengths[i], "kernel's", (void *)0xffff888000000000ul);
		try(kind, level->number, name, lengths[i], "four", page + PAGE - 4);
		try(kind, level->number, name, lengths[i], "page", page);
	}
}

int main(int argc, char **argv)
{
	unsigned char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int keeps, on = 1, whole = argc == 2 && !strcmp(argv[1], "whole");

	if (argc != 2 || (!whole && strcmp(argv[1], "short"))) {
		fprintf(stderr, "usage: %s whole|short\n", argv[0]);
		return 2;
	}
	if (pages == MAP_FAILED || mprotect(pages + PAGE, PAGE, PROT_NONE))
		die("mmap");
	memcpy(pages, "reno", 4);
	memcpy(pages + PAGE - 4, "reno", 4);
	listeners[0] = listening(AF_INET);
	listeners[1] = listening(AF_INET6);
	/* As long as there is one such socket, the kernel does not switch to timestamps and back for each of the
	 * others. */
	keeps = socket(AF_INET, SOCK_DGRAM, 0);
	if (keeps < 0 || setsockopt(keeps, SOL_SOCKET, SO_TIMESTAMP, &on, sizeof(on)))
		die("SO_TIMESTAMP");
	for (size_t kind = 0; kind < COUNT(kinds); kind++)
		for (size_t level = 0; level < COUNT(levels); level++)
			for (int name = 0; name < (has_options(&kinds[kind], levels[level].number) ? NAMES : FEW);
			     name++) {
				if (whole)
					walk_whole(&kinds[kind], &levels[level], name);
				else if (!kinds[kind].connected &&
					 (kinds[kind].type == SOCK_STREAM) == (kinds[kind].family == AF_INET))
					walk_short(&kinds[kind], &levels[level], name, pages);
			}
	return 0;
}
