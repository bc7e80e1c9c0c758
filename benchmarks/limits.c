/* Reads memory, or multiplies in registers, on several threads at once.
 *
 *     limits read THREADS BYTES_A_THREAD SECONDS      GB/s
 *     limits fp32 THREADS 0 SECONDS                   GFLOP/s of fused multiply-adds
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef float vec __attribute__((vector_size(32)));

struct job {
    int multiply;
    size_t bytes;
    double seconds, amount, took;
    pthread_barrier_t *together;
    float keep;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Four sums hide the latency of an addition. */
static float read_once(const vec *data, size_t count) {
    vec a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i + 4 <= count; i += 4) {
        a += data[i];
        b += data[i + 1];
        c += data[i + 2];
        d += data[i + 3];
    }
    a += b + c + d;
    return a[0] + a[3];
}

/* Twelve independent chains of fused multiply-adds, 8 wide: 12 * 8 * 2 operations a turn. */
static float multiply_once(long turns) {
    vec sums[12], x, y;
    for (int k = 0; k < 12; k++)
        for (int i = 0; i < 8; i++) sums[k][i] = k + i;
    for (int i = 0; i < 8; i++) { x[i] = 0.999f; y[i] = 1e-3f; }
    for (long t = 0; t < turns; t++) {
        __asm__ volatile("" : "+x"(x), "+x"(y));
        for (int k = 0; k < 12; k++) sums[k] = sums[k] * x + y;
    }
    float total = 0;
    for (int k = 0; k < 12; k++) total += sums[k][0];
    return total;
}

static void *work(void *argument) {
    struct job *job = argument;
    vec *data = NULL;
    size_t count = job->bytes / sizeof(vec);
    if (!job->multiply) {
        if (posix_memalign((void **)&data, 4096, job->bytes)) exit(1);
        memset(data, 0, job->bytes); /* by the thread that reads it */
        job->keep += read_once(data, count);
    }
    pthread_barrier_wait(job->together);
    double start = now();
    do {
        if (job->multiply) {
            job->keep += multiply_once(100000);
            job->amount += 100000.0 * 12 * 8 * 2;
        } else {
            job->keep += read_once(data, count);
            job->amount += (double)job->bytes;
        }
    } while ((job->took = now() - start) < job->seconds);
    free(data);
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int threads = atoi(argv[2]);
    if (threads < 1 || threads > 1024) return 2;
    struct job jobs[threads];
    pthread_t ids[threads];
    pthread_barrier_t together;
    pthread_barrier_init(&together, NULL, threads);
    for (int i = 0; i < threads; i++) {
        memset(&jobs[i], 0, sizeof jobs[i]);
        jobs[i].multiply = !strcmp(argv[1], "fp32");
        jobs[i].bytes = strtoull(argv[3], NULL, 10);
        jobs[i].seconds = atof(argv[4]);
        jobs[i].together = &together;
        if (pthread_create(&ids[i], NULL, work, &jobs[i])) return 1;
    }
    double speed = 0;
    float keep = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        speed += jobs[i].amount / jobs[i].took;
        keep += jobs[i].keep;
    }
    fprintf(stderr, "%g\n", keep); /* so that nothing is optimised away */
    printf("%.3f\n", speed / 1e9);
    return 0;
}
