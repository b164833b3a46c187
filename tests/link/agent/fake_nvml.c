/* A driver library of one GPU with 80 GiB. The file that FAKE_NVML names says what runs on it: first `ok` or
   `broken`, then a line for each process: pid, percent of the time, bytes of memory. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu, compute; } process_t;
typedef struct { unsigned pid; unsigned long long at; unsigned sm, mem, enc, dec; } sample_t;
typedef struct { unsigned pid, util; unsigned long long bytes; } entry_t;

enum { SUCCESS = 0, NOT_FOUND = 6, INSUFFICIENT = 7, LOST = 15, MAX = 64 };

static int entries(entry_t *found) {
    char word[16] = "";
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    if (!file) return -1;
    int count = -1;
    if (fscanf(file, "%15s", word) == 1 && !strcmp(word, "ok"))
        for (count = 0; count < MAX; count++)
            if (fscanf(file, "%u %u %llu", &found[count].pid, &found[count].util, &found[count].bytes) != 3) break;
    fclose(file);
    return count;
}

int nvmlInitWithFlags(unsigned flags) { entry_t e[MAX]; return entries(e) < 0 ? LOST : SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return SUCCESS; }
int nvmlDeviceGetUUID(void *d, char *text, unsigned size) { snprintf(text, size, "GPU-fake-0"); return SUCCESS; }
int nvmlDeviceGetName(void *d, char *text, unsigned size) { snprintf(text, size, "Fake H100"); return SUCCESS; }
int nvmlDeviceGetMemoryInfo(void *d, memory_t *memory) {
    memory->total = 80ULL << 30;
    memory->free = memory->total;
    memory->used = 0;
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *count, process_t *out) {
    entry_t e[MAX];
    int n = entries(e);
    if (n < 0) return LOST;
    if (n == 0) { *count = 0; return SUCCESS; }
    if (!out || (int)*count < n) { *count = n; return INSUFFICIENT; }
    for (int i = 0; i < n; i++) out[i] = (process_t){e[i].pid, e[i].bytes, -1, -1};
    *count = n;
    return SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *d, unsigned *count, process_t *out) {
    *count = 0;
    return SUCCESS;
}
int nvmlDeviceGetProcessUtilization(void *d, sample_t *out, unsigned *count, unsigned long long since) {
    entry_t e[MAX];
    struct timespec now;
    int n = entries(e);
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long at = now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
    if (n < 0) return LOST;
    if (n == 0 || at <= since) return NOT_FOUND;
    /* Two samples of each process, and one of nobody, as real drivers give. */
    if (!out) { *count = 2 * n + 1; return INSUFFICIENT; }
    memset(out, 0, sizeof(sample_t) * (2 * n + 1));
    for (int i = 0; i < n; i++) {
        out[2 * i] = (sample_t){e[i].pid, at - 1, e[i].util - 10, 0, 0, 0};
        out[2 * i + 1] = (sample_t){e[i].pid, at, e[i].util + 10, 0, 0, 0};
    }
    *count = 2 * n + 1;
    return SUCCESS;
}
