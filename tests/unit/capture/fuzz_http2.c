/*
 * The probe's reading of HTTP/2 on this machine, under sanitizers and fed by libFuzzer: with the stand-ins of
 * fuzz_http.c, and with a slow parser of frames that shares no code with the probe's. What is reported must be exactly
 * what that one finds: an id that stands literally in what a segment holds of a header block, when no other does.
 *
 * Input: as fuzz_http.c takes it, the stream without the preface, which is put in front.
 */
#define ENTRY fuzz_http
#include "fuzz_http.c"

static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

static struct {
	bool begun;
	size_t next;  /* the next byte of a frame's header that the probe has not seen */
	size_t frame; /* where that frame begins */
	struct report reports[REPORTS];
	size_t count;
} wanted_reports;

/* Looks for ids in a piece of a header block, where the frame begins at `at`. */
static void find_ids(const uint8_t *piece, size_t bytes, size_t at)
{
	static const char name[] = "\x0btraceparent";
	struct report report = { .at = at, .ack = place.ack, .shared = true };
	size_t alike = 0, fields = 0;

	for (size_t i = 0; i + 4 <= bytes; i++)
		alike += !memcmp(piece + i, "\x0btra", 4); /* the probe takes more than one for two of our fields */
	for (size_t i = 0; i + 69 <= bytes; i++) {
		char value[56] = { 0 };

		if (memcmp(piece + i + 1, name, 12) || (piece[i] != 0x40 && piece[i] != 0x10 && piece[i]))
			continue;
		fields++;
		memcpy(value, piece + i + 14, 55);
		if (piece[i + 13] == 55 && !memcmp(value, "00", 2))
			report.ids = read_traceparent(value, 55);
	}
	if (fields == 1 && alike == 1 && report.ids.origin)
		wanted_reports.reports[wanted_reports.count++] = report;
}

static void follow_frames(const uint8_t *stream, size_t start, size_t end)
{
	int chunks = CHUNKS;

	if (!wanted_reports.begun) {
		if (start || place.delivered || end < sizeof(preface) - 1)
			return;
		wanted_reports.begun = true;
		chunks--; /* of which the preface is one */
		wanted_reports.next = wanted_reports.frame = sizeof(preface) - 1;
	}
	for (int i = 0; i < FRAMES * chunks; i++) {
		const uint8_t *header = stream + wanted_reports.frame;
		size_t payload = wanted_reports.frame + 9, length, from, to;

		if (wanted_reports.next < start || wanted_reports.next >= end)
			return;
		if (payload > end) {
			wanted_reports.next = end;
			return;
		}
		length = (size_t)header[0] << 16 | (size_t)header[1] << 8 | header[2];
		from = payload;
		to = payload + length;
		if (header[4] & 8 && from < end)
			to -= least(length, stream[from++]);
		if (header[4] & 32)
			from += 5;
		if (header[3] == 1 && from < least(to, end))
			find_ids(stream + from, least(least(to, end) - from, TCPIO_CHUNK_BYTES), wanted_reports.frame);
		wanted_reports.next = wanted_reports.frame = payload + length;
	}
}

static void check_frames(void)
{
	size_t found = 0;

	for (size_t i = 0; i < report_count; i++) {
		const struct report *wanted = &wanted_reports.reports[found];

		assert(reports[i].shared && found++ < wanted_reports.count);
		assert(reports[i].at == wanted->at && reports[i].ack == wanted->ack);
		assert(same_ids(&reports[i].ids, &wanted->ids));
	}
	assert(found == wanted_reports.count);
}

static void run_frames(const uint8_t *steps, size_t step_count, const uint8_t *stream, size_t size)
{
	for (size_t i = 0; i <= step_count; i++) {
		uint8_t what = i < step_count ? steps[3 * i] : STEP_LONG;
		size_t length = i < step_count ? steps[3 * i + 1] + (size_t)256 * steps[3 * i + 2] : size;
		size_t start = place.delivered, end = place.delivered;

		switch (what % STEP_KINDS) {
		case STEP_SEGMENT:
			end += length % 256;
			break;
		case STEP_LONG:
			end += length;
			break;
		case STEP_AGAIN:
			start -= least(start, length);
			break;
		case STEP_OVERLAP:
			start -= least(start, length % 256);
			end += length / 256;
			break;
		case STEP_GAP: /* seen later, by STEP_AGAIN, or never */
			length = least(size - place.delivered, length % 256);
			place.delivered += length;
			place.host_sent += place.sent ? length : 0;
			place.host_received += place.sent ? 0 : length;
			continue;
		default:
			if (wanted_reports.begun)
				answer(length & 1 ? "HTTP/1.1 200 OK\r\n" : "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
			continue;
		}
		end = least(end, size);
		if (end == start)
			continue;
		interrupted_loading = what & STEP_INTERRUPTED_LOADING;
		interrupted_reporting = !interrupted_loading && what & STEP_INTERRUPTED_REPORTING;
		follow_frames(stream, start, end);
		carry(stream + start, end - start, place.seq + (uint32_t)start, place.ack, place.sent);
		if (end > place.delivered) {
			place.host_received += place.sent ? 0 : end - place.delivered;
			place.delivered = end;
		}
		check_frames();
		place.ack += 3;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t stream[sizeof(preface) - 1 + STREAM_BYTES];
	size_t steps;

	if (!begin(&data, &size, &steps))
		return 0;
	wanted_reports.begun = false;
	wanted_reports.count = 0;
	memcpy(stream, preface, sizeof(preface) - 1);
	memcpy(stream + sizeof(preface) - 1, data + 3 * steps, size);
	run_frames(data, steps, stream, sizeof(preface) - 1 + size);
	return 0;
}
