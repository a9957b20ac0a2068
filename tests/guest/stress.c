/* Writes to a disk from inside the guest, so that the host can know exactly what was acknowledged.
 *
 * Every operation is a line on standard output after it has been acknowledged by the device, never before.
 *   stress write DEV OFFSET LENGTH SEED      deterministic bytes (workload.py makes the same ones)
 *   stress zero DEV OFFSET LENGTH            BLKZEROOUT
 *   stress discard DEV OFFSET LENGTH         BLKDISCARD
 *   stress random DEV SEED COUNT MAXLENGTH   COUNT random operations; 0: until killed
 *   stress pingpong DEVA DEVB SECONDS        an increasing counter, alternately to block 0 of both
 *   stress latency DEV SECONDS DEPTH         random 4 KiB writes; prints operations, p50, p99 and maximum in us
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static uint64_t next(uint64_t *state)
{
    /* splitmix64 */
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static void die(const char *what)
{
    fprintf(stderr, "stress: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_disk(const char *path)
{
    int fd = open(path, O_RDWR | O_DIRECT);
    if (fd < 0)
        die(path);
    return fd;
}

static uint64_t disk_size(int fd)
{
    uint64_t size;
    if (ioctl(fd, BLKGETSIZE64, &size) < 0)
        die("BLKGETSIZE64");
    return size;
}

static void *aligned(size_t length)
{
    void *p;
    if (posix_memalign(&p, 4096, length))
        die("posix_memalign");
    return p;
}

static void do_write(int fd, uint64_t offset, uint64_t length, uint64_t seed)
{
    uint64_t *buffer = aligned(length), state = seed;
    for (uint64_t i = 0; i < length / 8; i++)
        buffer[i] = next(&state);
    if (pwrite(fd, buffer, length, offset) != (ssize_t)length)
        die("pwrite");
    free(buffer);
    printf("write %llu %llu %llu\n", (unsigned long long)offset, (unsigned long long)length, (unsigned long long)seed);
    fflush(stdout);
}

static void do_range(int fd, unsigned long request, const char *name, uint64_t offset, uint64_t length)
{
    uint64_t range[2] = {offset, length};
    if (ioctl(fd, request, range) < 0)
        die(name);
    printf("%s %llu %llu\n", name, (unsigned long long)offset, (unsigned long long)length);
    fflush(stdout);
}

static void do_random(int fd, uint64_t seed, uint64_t count, uint64_t max)
{
    uint64_t size = disk_size(fd), state = seed;
    for (uint64_t i = 0; count == 0 || i < count; i++) {
        uint64_t kind = next(&state) % 8;
        uint64_t length = (next(&state) % (max / 512) + 1) * 512;
        uint64_t offset = next(&state) % ((size - length) / 512 + 1) * 512;
        if (kind == 0)
            do_range(fd, BLKDISCARD, "discard", offset, length);
        else if (kind == 1)
            do_range(fd, BLKZEROOUT, "zero", offset, length);
        else
            do_write(fd, offset, length, next(&state));
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void pingpong(int a, int b, double seconds)
{
    uint64_t *buffer = aligned(4096);
    memset(buffer, 0, 4096);
    double end = now() + seconds;
    for (uint64_t n = 1; now() < end; n++) {
        buffer[0] = n;
        if (pwrite(a, buffer, 4096, 0) != 4096 || pwrite(b, buffer, 4096, 0) != 4096)
            die("pwrite");
    }
    printf("pingpong %llu\n", (unsigned long long)buffer[0]);
}

#define SAMPLES 400000
struct lane {
    int fd;
    double end;
    uint64_t seed, size;
    uint32_t *us;
    int count;
};

static void *latency_lane(void *argument)
{
    struct lane *lane = argument;
    char *buffer = aligned(4096);
    memset(buffer, 0x5a, 4096);
    while (lane->count < SAMPLES) {
        double start = now();
        if (start >= lane->end)
            break;
        memcpy(buffer, &start, sizeof start);
        if (pwrite(lane->fd, buffer, 4096, next(&lane->seed) % (lane->size / 4096) * 4096) != 4096)
            die("pwrite");
        lane->us[lane->count++] = (now() - start) * 1e6;
    }
    return NULL;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void latency(int fd, double seconds, int depth)
{
    pthread_t threads[64];
    struct lane lanes[64];
    uint32_t *all = malloc(sizeof(uint32_t) * SAMPLES * depth);
    int total = 0;
    double start = now();
    for (int i = 0; i < depth; i++) {
        lanes[i] = (struct lane){fd, start + seconds, 1000 + i, disk_size(fd), malloc(sizeof(uint32_t) * SAMPLES), 0};
        if (pthread_create(&threads[i], NULL, latency_lane, &lanes[i]))
            die("pthread_create");
    }
    for (int i = 0; i < depth; i++) {
        pthread_join(threads[i], NULL);
        memcpy(all + total, lanes[i].us, sizeof(uint32_t) * lanes[i].count);
        total += lanes[i].count;
    }
    qsort(all, total, sizeof *all, by_value);
    printf("latency iops=%.0f p50=%u p99=%u max=%u\n", total / (now() - start), all[total / 2],
           all[(int)(total * 0.99)], all[total - 1]);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    int fd = open_disk(argv[2]);
    const char *verb = argv[1];
    uint64_t a = argc > 3 ? strtoull(argv[3], NULL, 0) : 0, b = argc > 4 ? strtoull(argv[4], NULL, 0) : 0;
    uint64_t c = argc > 5 ? strtoull(argv[5], NULL, 0) : 0;
    if (!strcmp(verb, "write"))
        do_write(fd, a, b, c);
    else if (!strcmp(verb, "zero"))
        do_range(fd, BLKZEROOUT, "zero", a, b);
    else if (!strcmp(verb, "discard"))
        do_range(fd, BLKDISCARD, "discard", a, b);
    else if (!strcmp(verb, "random"))
        do_random(fd, a, b, c);
    else if (!strcmp(verb, "pingpong"))
        pingpong(fd, open_disk(argv[3]), b);
    else if (!strcmp(verb, "latency"))
        latency(fd, a, b);
    else
        return 2;
    return 0;
}
