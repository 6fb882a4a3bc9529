/*
 * sieve: the code of guests/ring3.S in an ordinary process, the measure of benchmarks/guests.py.
 *
 * For each line of standard input, a number, it counts the primes that often and prints the nanoseconds
 * of CPU time it took and the count.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { SCRATCH = 500000 };

uint32_t sieve(uint8_t *scratch); /* guests/sieve.inc */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

int main(void)
{
    char line[64];
    uint8_t *scratch = mmap(NULL, SCRATCH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (scratch == MAP_FAILED)
        err(1, "mmap");
    while (fgets(line, sizeof(line), stdin)) {
        unsigned long rounds = strtoul(line, NULL, 0);
        uint64_t start = now_ns();
        uint32_t primes = 0;

        for (unsigned long i = 0; i < rounds; i++)
            primes = sieve(scratch);
        printf("%llu %u\n", (unsigned long long)(now_ns() - start), primes);
        fflush(stdout);
    }
    return 0;
}
