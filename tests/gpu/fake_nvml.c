/* A stand-in for libnvidia-ml.so.1: what pynvml calls of it, told from files that are read again at every call.

   FAKE_NVML names a JSON file:
     {"fail": {FUNCTION: CODE}, "hang": FUNCTION, "gpus": [{"uuid", "name", "memory", "numa", "lost",
      "processes": [{"pid", "memory", "util", "mps"}], "links": ["X", "NV", "PIX", ...], "mig_slices_max",
      "parts": [{"uuid", "name", "memory", "slices"}]}]}
   A GPU with `parts`, be it an empty list, is in MIG mode. Functions are named without `nvmlDeviceGet`, `nvml` or
   version: `Count`, `MemoryInfo`, `Init`. A code of NVML's is what the function answers; one that hangs never does.

   FAKE_NVML_LEDGER names a folder: FOLDER/UUID/ANY is a process that uses the GPU (or part) as long as it holds a
   lock on the file, in which stand its memory in bytes and its utilisation in percent. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT = 7, NOT_LOADED = 9, LOST = 15 };
enum { NODES_MAX = 8192, BYTES_MAX = 1 << 18, PROCESSES_MAX = 256, PARTS_MAX = 16 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned pid; unsigned long long at; unsigned sm, mem, enc, dec; } sample_t;
typedef struct {
    unsigned multiprocessors, copy, decoders, encoders, jpeg, ofa, gpu_slices, compute_slices;
    unsigned long long memory_mb;
} attributes_t;
typedef struct { unsigned pid, util; int mps; unsigned long long memory; } use_t;

/* ---- JSON: a tree of nodes in one array; strings stay where they were read ---- */

typedef struct node {
    char kind; /* { [ " 0, or t for true */
    char *key, *text;
    double number;
    struct node *child, *next;
} node_t;

static char bytes[BYTES_MAX];
static node_t nodes[NODES_MAX];
static int node_count;
static char *at;

static void skip(const char *set) {
    while (*at && strchr(set, *at)) at++;
}

static char *string(void) {
    char *start = ++at, *out = start;
    for (; *at && *at != '"'; at++) {
        if (*at == '\\' && at[1]) at++;
        *out++ = *at;
    }
    if (*at) at++;
    *out = 0;
    return start;
}

static node_t *value(char *key) {
    if (node_count == NODES_MAX) abort();
    node_t *node = &nodes[node_count++], **last = &node->child;
    *node = (node_t){.key = key};
    skip(" \t\r\n");
    node->kind = *at;
    if (*at == '"') {
        node->text = string();
    } else if (*at == '{' || *at == '[') {
        int named = *at++ == '{';
        for (skip(" \t\r\n,"); *at && *at != '}' && *at != ']'; skip(" \t\r\n,")) {
            char *name = named ? string() : NULL;
            skip(" \t\r\n:");
            *last = value(name);
            last = &(*last)->next;
        }
        if (*at) at++;
    } else {
        char *end;
        node->number = node->kind == 't' ? 1 : strtod(at, &end);
        while (*at && !strchr(",}] \t\r\n", *at)) at++;
    }
    return node;
}

static node_t *get(node_t *node, const char *key) {
    for (node = node ? node->child : NULL; node; node = node->next)
        if (!strcmp(node->key, key)) return node;
    return NULL;
}

static node_t *nth(node_t *list, int index) {
    for (list = list ? list->child : NULL; list && index; index--) list = list->next;
    return list;
}

static int count(node_t *list) {
    int found = 0;
    for (list = list ? list->child : NULL; list; list = list->next) found++;
    return found;
}

static double number(node_t *node, const char *key, double otherwise) {
    node = get(node, key);
    return node ? node->number : otherwise;
}

static const char *text(node_t *node, const char *key, const char *otherwise) {
    node = get(node, key);
    return node && node->text ? node->text : otherwise;
}

/* ---- the state, and how each call begins and ends ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static node_t *state;

static int begin(const char *function) {
    pthread_mutex_lock(&lock);
    const char *path = getenv("FAKE_NVML");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t length = file >= 0 ? read(file, bytes, BYTES_MAX - 1) : -1;
    if (file >= 0) close(file);
    if (length <= 0) return NOT_LOADED;
    bytes[length] = 0;
    at = bytes;
    node_count = 0;
    state = value(NULL);
    if (!strcmp(text(state, "hang", ""), function))
        for (;;) pause();
    return (int)number(get(state, "fail"), function, SUCCESS);
}

static int end(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}

#define BEGIN(function)             \
    int code = begin(function);     \
    if (code != SUCCESS) return end(code)

/* A handle is the place of a GPU or part in the state: it stays good when the state is read again. */
static void *handle(int gpu, int part) { return (void *)(uintptr_t)((gpu + 1) * PARTS_MAX * 2 + part + 1); }

static node_t *device(void *of, int *is_part) {
    int place = (int)(uintptr_t)of, part = place % (PARTS_MAX * 2) - 1;
    node_t *gpu = nth(get(state, "gpus"), place / (PARTS_MAX * 2) - 1);
    if (is_part) *is_part = part >= 0;
    return part >= 0 ? nth(get(gpu, "parts"), part) : gpu;
}

#define DEVICE(of)                                         \
    int is_part;                                           \
    node_t *found = device(of, &is_part);                  \
    if (!found) return end(INVALID);                       \
    if (number(found, "lost", 0)) return end(LOST);        \
    (void)is_part

static int put(char *out, unsigned size, const char *what) {
    if (strlen(what) >= size) return INSUFFICIENT;
    strcpy(out, what);
    return SUCCESS;
}

static int uses(node_t *of, use_t *out) {
    int found = 0;
    node_t *listed = get(of, "processes");
    for (node_t *one = listed ? listed->child : NULL; one && found < PROCESSES_MAX; one = one->next)
        out[found++] = (use_t){number(one, "pid", 0), number(one, "util", 0), number(one, "mps", 0),
                               number(one, "memory", 0)};
    const char *root = getenv("FAKE_NVML_LEDGER");
    char path[4096], line[64];
    snprintf(path, sizeof path, "%s/%s", root ? root : "", text(of, "uuid", ""));
    DIR *folder = root ? opendir(path) : NULL;
    if (!folder) return found;
    for (struct dirent *entry; (entry = readdir(folder)) && found < PROCESSES_MAX;) {
        int file = entry->d_name[0] == '.' ? -1 : openat(dirfd(folder), entry->d_name, O_RDWR | O_CLOEXEC);
        if (file < 0) continue;
        struct flock holder = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        ssize_t length = read(file, line, sizeof line - 1);
        if (length > 0 && !fcntl(file, F_GETLK, &holder) && holder.l_type != F_UNLCK && holder.l_pid > 0) {
            line[length] = 0;
            out[found] = (use_t){holder.l_pid, 0, 0, 0};
            if (sscanf(line, "%llu %u", &out[found].memory, &out[found].util) == 2) found++;
        }
        close(file);
    }
    closedir(folder);
    return found;
}

/* ---- what pynvml calls ---- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    BEGIN("Init");
    return end(SUCCESS);
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_LOADED: return "Driver Not Loaded";
        case LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    BEGIN("Count");
    *out = count(get(state, "gpus"));
    return end(SUCCESS);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    BEGIN("HandleByIndex");
    *out = handle(index, -1);
    DEVICE(*out);
    return end(SUCCESS);
}

int nvmlDeviceGetUUID(void *of, char *out, unsigned size) {
    BEGIN("UUID");
    DEVICE(of);
    return end(put(out, size, text(found, "uuid", "GPU-0")));
}

int nvmlDeviceGetName(void *of, char *out, unsigned size) {
    BEGIN("Name");
    DEVICE(of);
    return end(put(out, size, text(found, "name", "Fake GPU")));
}

int nvmlDeviceGetMemoryInfo(void *of, memory_t *out) {
    BEGIN("MemoryInfo");
    DEVICE(of);
    use_t list[PROCESSES_MAX];
    *out = (memory_t){.total = number(found, "memory", 0)};
    for (int left = uses(found, list); left--;) out->used += list[left].memory;
    out->free = out->total - out->used;
    return end(SUCCESS);
}

int nvmlDeviceGetNumaNodeId(void *of, unsigned *out) {
    BEGIN("NumaNodeId");
    DEVICE(of);
    if (!get(found, "numa")) return end(NOT_SUPPORTED);
    *out = number(found, "numa", 0);
    return end(SUCCESS);
}

int nvmlDeviceGetTopologyCommonAncestor(void *of, void *other, int *out) {
    BEGIN("TopologyCommonAncestor");
    DEVICE(of);
    node_t *link = nth(get(found, "links"), (int)(uintptr_t)other / (PARTS_MAX * 2) - 1);
    const char *levels[] = {"X", "PIX", "PXB", "PHB", "NODE", "SYS"}, *name = link ? link->text : "SYS";
    for (int level = 0; level < 6; level++)
        if (!strcmp(levels[level], name)) *out = level * 10;
    if (!strcmp(name, "NV")) *out = 40;
    return end(SUCCESS);
}

int nvmlDeviceGetP2PStatus(void *of, void *other, int capability, int *out) {
    BEGIN("P2PStatus");
    DEVICE(of);
    node_t *link = nth(get(found, "links"), (int)(uintptr_t)other / (PARTS_MAX * 2) - 1);
    *out = capability == 2 && link && !strcmp(link->text, "NV") ? 0 : 5;
    return end(SUCCESS);
}

int nvmlDeviceGetMigMode(void *of, unsigned *current, unsigned *pending) {
    BEGIN("MigMode");
    DEVICE(of);
    *current = *pending = get(found, "parts") != NULL;
    return end(SUCCESS);
}

int nvmlDeviceGetMaxMigDeviceCount(void *of, unsigned *out) {
    BEGIN("MaxMigDeviceCount");
    DEVICE(of);
    *out = number(found, "mig_slices_max", 7);
    return end(SUCCESS);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *of, unsigned index, void **out) {
    BEGIN("MigDeviceHandleByIndex");
    DEVICE(of);
    if ((int)index >= count(get(found, "parts"))) return end(NOT_FOUND);
    *out = handle((int)(uintptr_t)of / (PARTS_MAX * 2) - 1, index);
    return end(SUCCESS);
}

int nvmlDeviceGetAttributes_v2(void *of, attributes_t *out) {
    BEGIN("Attributes");
    DEVICE(of);
    if (!is_part) return end(NOT_SUPPORTED);
    *out = (attributes_t){.gpu_slices = number(found, "slices", 1), .compute_slices = number(found, "slices", 1)};
    out->memory_mb = (unsigned long long)number(found, "memory", 0) >> 20;
    return end(SUCCESS);
}

static int running(node_t *of, unsigned *size, process_t *out, int mps) {
    use_t list[PROCESSES_MAX];
    unsigned kept = 0;
    for (int left = uses(of, list); left--;)
        if (!!list[left].mps == mps) list[kept++] = list[left];
    unsigned room = *size;
    *size = kept;
    if (!kept) return SUCCESS;
    if (!out || room < kept) return INSUFFICIENT;
    for (unsigned i = 0; i < kept; i++) out[i] = (process_t){list[i].pid, list[i].memory, -1, -1};
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *of, unsigned *size, process_t *out) {
    BEGIN("ComputeRunningProcesses");
    DEVICE(of);
    return end(running(found, size, out, 0));
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *of, unsigned *size, process_t *out) {
    BEGIN("MPSComputeRunningProcesses");
    DEVICE(of);
    return end(running(found, size, out, 1));
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *of, unsigned *size, process_t *out) {
    (void)of, (void)out;
    *size = 0;
    return SUCCESS;
}

int nvmlDeviceGetProcessUtilization(void *of, sample_t *out, unsigned *size, unsigned long long since) {
    BEGIN("ProcessUtilization");
    DEVICE(of);
    if (is_part || get(found, "parts")) return end(NOT_SUPPORTED);
    use_t list[PROCESSES_MAX];
    struct timespec now;
    int used = uses(found, list);
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long now_us = now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
    if (!used || now_us <= since) return end(NOT_FOUND);
    /* Two samples of each process, and one of nobody, as real drivers give. */
    unsigned room = *size;
    *size = 2 * used + 1;
    if (!out || room < *size) return end(INSUFFICIENT);
    memset(out, 0, sizeof(sample_t) * *size);
    for (int i = 0; i < used; i++) {
        out[2 * i] = (sample_t){list[i].pid, now_us - 1, list[i].util - 10, 0, 0, 0};
        out[2 * i + 1] = (sample_t){list[i].pid, now_us, list[i].util + 10, 0, 0, 0};
    }
    return end(SUCCESS);
}
