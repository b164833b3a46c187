/* A stand-in for libnvidia-ml.so.1: what programs ask of it, told from files that are read again at every call.

   FAKE_NVML names a JSON file:
     {"driver", "cuda", "fail": {FUNCTION: CODE}, "hang": FUNCTION or [FUNCTION, ...], "gpus": [{"uuid", "name", "pci",
      "memory", "util", "temperature", "power", "numa", "lost", "fail", "hang", "processes": [{"pid", "memory", "util",
      "mps"}], "links": ["X", "NV", "PIX", ...], "mig_slices_max", "parts": [{"uuid", "name", "memory", "slices",
      "processes"}]}]}
   Memory is in bytes, `util` in percent, power in milliwatts. Without the file the driver is not loaded. A GPU with
   `parts`, be it an empty list, is in MIG mode. Functions are named without `nvmlDeviceGet`, `nvmlDevice`, `nvml` or
   version: `Count`, `MemoryInfo`, `Init`, and for one GPU or for all. A code of NVML's is what the function answers;
   one that hangs never does, and neither does any other call of its process.

   FAKE_NVML_LEDGER names a folder: FOLDER/UUID/ANY is a process that uses the GPU (or part) as long as it holds a
   lock on the file, in which stand its memory in bytes, its utilisation in percent, and `mps` if it uses MPS.

   Every other function of NVML is made by the build: it answers NOT_SUPPORTED. */
#define _GNU_SOURCE
#include <stdint.h>
#include <strings.h>
#include <time.h>

#include "fake_nvml_types.h"
#include "fake_nvml_state.h"

enum { PARTS_MAX = 16 };

/* ---- how each call begins and ends ---- */

static int opened;

static int begin(const char *function) {
    pthread_mutex_lock(&lock);
    if (!load()) return NVML_ERROR_DRIVER_NOT_LOADED;
    int code = injected(state, function);
    return !code && !opened && strcmp(function, "Init") ? NVML_ERROR_UNINITIALIZED : code;
}

static nvmlReturn_t end(int code) {
    pthread_mutex_unlock(&lock);
    return (nvmlReturn_t)code;
}

#define BEGIN(function)          \
    int code = begin(function);  \
    if (code) return end(code)

/* A handle is the place of a GPU or part in the state: it stays good when the state is read again. */
static nvmlDevice_t handle(int gpu, int part) {
    return (nvmlDevice_t)(uintptr_t)((gpu + 1) * PARTS_MAX * 2 + part + 1);
}

static int gpu_index(nvmlDevice_t of) { return (int)(uintptr_t)of / (PARTS_MAX * 2) - 1; }

static int part_index(nvmlDevice_t of) { return (int)(uintptr_t)of % (PARTS_MAX * 2) - 1; }

static node_t *gpu_of(nvmlDevice_t of) { return nth(get(state, "gpus"), gpu_index(of)); }

/* Begins a call about a GPU or a part: `found` is it, `is_part` which of the two. */
#define DEVICE(function, of)                                                      \
    BEGIN(function);                                                              \
    node_t *gpu = gpu_of(of);                                                     \
    int is_part = part_index(of) >= 0;                                            \
    node_t *found = is_part ? nth(get(gpu, "parts"), part_index(of)) : gpu;       \
    if (!found) return end(NVML_ERROR_INVALID_ARGUMENT);                          \
    if (number(gpu, "lost", 0)) return end(NVML_ERROR_GPU_IS_LOST);               \
    if ((code = injected(gpu, function))) return end(code)

static int put(char *out, unsigned int size, const char *what) {
    if (strlen(what) >= size) return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(out, what);
    return NVML_SUCCESS;
}

/* Of a GPU in MIG mode, the processes of its parts. */
static int all_uses(node_t *of, use_t *out) {
    int count = uses(of, out, 0);
    node_t *parts = get(of, "parts");
    for (node_t *part = parts ? parts->child : NULL; part; part = part->next) count = uses(part, out, count);
    return count;
}

static unsigned long long used(node_t *of) {
    use_t list[PROCESSES_MAX];
    unsigned long long sum = 0, total = number(of, "memory", 0);
    for (int left = all_uses(of, list); left--;) sum += list[left].memory;
    return sum < total ? sum : total;
}

/* ---- the library and the system ---- */

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    BEGIN("Init");
    opened++;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
    pthread_mutex_lock(&lock);
    if (!opened) return end(NVML_ERROR_UNINITIALIZED);
    opened--;
    return end(NVML_SUCCESS);
}

const char *nvmlErrorString(nvmlReturn_t code) {
    switch ((int)code) {
        case NVML_SUCCESS: return "Success";
        case NVML_ERROR_UNINITIALIZED: return "Uninitialized";
        case NVML_ERROR_INVALID_ARGUMENT: return "Invalid Argument";
        case NVML_ERROR_NOT_SUPPORTED: return "Not Supported";
        case NVML_ERROR_NO_PERMISSION: return "Insufficient Permissions";
        case NVML_ERROR_NOT_FOUND: return "Not Found";
        case NVML_ERROR_INSUFFICIENT_SIZE: return "Insufficient Size";
        case NVML_ERROR_DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case NVML_ERROR_TIMEOUT: return "Timeout";
        case NVML_ERROR_GPU_IS_LOST: return "GPU is lost";
        case NVML_ERROR_RESET_REQUIRED: return "GPU requires reset";
        case NVML_ERROR_LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *out, unsigned int size) {
    BEGIN("SystemGetDriverVersion");
    return end(put(out, size, text(state, "driver", "580.65.06")));
}

nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, unsigned int size) {
    BEGIN("SystemGetNVMLVersion");
    return end(put(out, size, "13.580.65.06"));
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *out) {
    BEGIN("SystemGetCudaDriverVersion");
    *out = number(state, "cuda", 13000);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

/* ---- which GPUs there are ---- */

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *out) {
    BEGIN("Count");
    *out = count(get(state, "gpus"));
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *out) {
    *out = handle(index, -1);
    DEVICE("HandleByIndex", *out);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *out) {
    BEGIN("HandleByUUID");
    for (int gpu = 0; gpu < count(get(state, "gpus")); gpu++) {
        node_t *one = nth(get(state, "gpus"), gpu);
        for (int part = -1; part < count(get(one, "parts")); part++) {
            if (strcmp(text(part < 0 ? one : nth(get(one, "parts"), part), "uuid", ""), uuid)) continue;
            *out = handle(gpu, part);
            return end(NVML_SUCCESS);
        }
    }
    return end(NVML_ERROR_NOT_FOUND);
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t of, unsigned int *out) {
    DEVICE("Index", of);
    *out = is_part ? part_index(of) : gpu_index(of);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t of, unsigned int *out) {
    DEVICE("MinorNumber", of);
    *out = gpu_index(of);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t of, char *out, unsigned int size) {
    DEVICE("UUID", of);
    return end(put(out, size, text(found, "uuid", "GPU-0")));
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t of, char *out, unsigned int size) {
    DEVICE("Name", of);
    return end(put(out, size, text(found, "name", "Fake GPU")));
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t of, nvmlPciInfo_t *out) {
    DEVICE("PciInfo", of);
    memset(out, 0, sizeof *out);
    char own[16];
    snprintf(own, sizeof own, "0000:%02x:00.0", (gpu_index(of) + 1) & 255);
    sscanf(text(gpu, "pci", own), "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->busIdLegacy, sizeof out->busIdLegacy, "%04X:%02X:%02X.0", out->domain & 0xffff, out->bus & 255,
             out->device & 255);
    snprintf(out->busId, sizeof out->busId, "%08X:%02X:%02X.0", out->domain, out->bus & 255, out->device & 255);
    return end(NVML_SUCCESS);
}

/* ---- what a GPU is like, and how it does ---- */

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t of, nvmlMemory_t *out) {
    DEVICE("MemoryInfo", of);
    *out = (nvmlMemory_t){.total = number(found, "memory", 0), .used = used(found)};
    out->free = out->total - out->used;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t of, nvmlMemory_v2_t *out) {
    DEVICE("MemoryInfo", of);
    *out = (nvmlMemory_v2_t){.version = out->version, .total = number(found, "memory", 0), .used = used(found)};
    out->free = out->total - out->used;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t of, nvmlBAR1Memory_t *out) {
    DEVICE("BAR1MemoryInfo", of);
    *out = (nvmlBAR1Memory_t){.bar1Total = 256 << 20, .bar1Free = 254 << 20, .bar1Used = 2 << 20};
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t of, nvmlUtilization_t *out) {
    DEVICE("UtilizationRates", of);
    if (is_part || get(found, "parts")) return end(NVML_ERROR_NOT_SUPPORTED);
    use_t list[PROCESSES_MAX];
    unsigned int sum = number(found, "util", 0);
    for (int left = all_uses(found, list); left--;) sum += list[left].util;
    *out = (nvmlUtilization_t){.gpu = sum < 100 ? sum : 100};
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t of, nvmlTemperatureSensors_t sensor, unsigned int *out) {
    DEVICE("Temperature", of);
    if (sensor) return end(NVML_ERROR_INVALID_ARGUMENT);
    *out = number(found, "temperature", 40);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t of, unsigned int *out) {
    DEVICE("PowerUsage", of);
    *out = number(found, "power", 60000);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMemoryAffinity(nvmlDevice_t of, unsigned int size, unsigned long *out,
                                         nvmlAffinityScope_t scope) {
    (void)scope;
    DEVICE("MemoryAffinity", of);
    unsigned int node = number(gpu, "numa", 0), bits = 8 * sizeof *out;
    if (!get(gpu, "numa")) return end(NVML_ERROR_NOT_SUPPORTED);
    if (node / bits >= size) return end(NVML_ERROR_INVALID_ARGUMENT);
    memset(out, 0, size * sizeof *out);
    out[node / bits] = 1UL << node % bits;
    return end(NVML_SUCCESS);
}

static const char *link_between(node_t *gpu, nvmlDevice_t other) {
    node_t *link = nth(get(gpu, "links"), gpu_index(other));
    return link && link->text ? link->text : "SYS";
}

nvmlReturn_t nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t of, nvmlDevice_t other, nvmlGpuTopologyLevel_t *out) {
    DEVICE("TopologyCommonAncestor", of);
    const char *levels[] = {"X", "PIX", "PXB", "PHB", "NODE", "SYS"}, *name = link_between(gpu, other);
    /* GPUs with NVLink are connected through PCIe too, and this call tells of that. */
    *out = 40;
    for (int level = 0; level < 6; level++)
        if (!strcmp(levels[level], name)) *out = level * 10;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t of, nvmlDevice_t other, nvmlGpuP2PCapsIndex_t what,
                                    nvmlGpuP2PStatus_t *out) {
    DEVICE("P2PStatus", of);
    int linked = what == NVML_P2P_CAPS_INDEX_NVLINK && !strncmp(link_between(gpu, other), "NV", 2);
    *out = linked ? NVML_P2P_STATUS_OK : NVML_P2P_STATUS_NOT_SUPPORTED;
    return end(NVML_SUCCESS);
}

/* ---- parts in MIG mode ---- */

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t of, unsigned int *current, unsigned int *pending) {
    DEVICE("MigMode", of);
    *current = *pending = get(gpu, "parts") != NULL;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t of, unsigned int *out) {
    DEVICE("MaxMigDeviceCount", of);
    *out = get(gpu, "parts") ? number(gpu, "mig_slices_max", 7) : 0;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t of, unsigned int index, nvmlDevice_t *out) {
    DEVICE("MigDeviceHandleByIndex", of);
    if ((int)index >= count(get(gpu, "parts"))) return end(NVML_ERROR_NOT_FOUND);
    *out = handle(gpu_index(of), index);
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t of, unsigned int *out) {
    DEVICE("IsMigDeviceHandle", of);
    *out = is_part;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t of, nvmlDevice_t *out) {
    DEVICE("DeviceHandleFromMigDeviceHandle", of);
    *out = handle(gpu_index(of), -1);
    return end(is_part ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT);
}

nvmlReturn_t nvmlDeviceGetGpuInstanceId(nvmlDevice_t of, unsigned int *out) {
    DEVICE("GpuInstanceId", of);
    *out = part_index(of) + 1;
    return end(is_part ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetComputeInstanceId(nvmlDevice_t of, unsigned int *out) {
    DEVICE("ComputeInstanceId", of);
    *out = 0;
    return end(is_part ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED);
}

nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t of, nvmlDeviceAttributes_t *out) {
    DEVICE("Attributes", of);
    if (!is_part) return end(NVML_ERROR_NOT_SUPPORTED);
    unsigned int slices = number(found, "slices", 1);
    *out = (nvmlDeviceAttributes_t){.gpuInstanceSliceCount = slices};
    out->computeInstanceSliceCount = number(found, "compute_slices", slices);
    out->memorySizeMB = (unsigned long long)number(found, "memory", 0) >> 20;
    return end(NVML_SUCCESS);
}

/* ---- who uses it ---- */

static int running(node_t *of, unsigned int *size, nvmlProcessInfo_t *out, int mps) {
    use_t list[PROCESSES_MAX];
    unsigned int kept = 0;
    for (int left = all_uses(of, list), i = 0; i < left; i++)
        if (list[i].mps == mps) list[kept++] = list[i];
    unsigned int room = *size;
    *size = kept;
    if (!kept) return NVML_SUCCESS;
    if (!out || room < kept) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (unsigned int i = 0; i < kept; i++) out[i] = (nvmlProcessInfo_t){list[i].pid, list[i].memory, -1, -1};
    return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t of, unsigned int *size, nvmlProcessInfo_t *out) {
    DEVICE("ComputeRunningProcesses", of);
    return end(running(found, size, out, 0));
}

nvmlReturn_t nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t of, unsigned int *size, nvmlProcessInfo_t *out) {
    DEVICE("MPSComputeRunningProcesses", of);
    return end(running(found, size, out, 1));
}

nvmlReturn_t nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t of, unsigned int *size, nvmlProcessInfo_t *out) {
    (void)out;
    DEVICE("GraphicsRunningProcesses", of);
    *size = 0;
    return end(NVML_SUCCESS);
}

nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t of, nvmlProcessUtilizationSample_t *out, unsigned int *size,
                                             unsigned long long since) {
    DEVICE("ProcessUtilization", of);
    if (is_part || get(found, "parts")) return end(NVML_ERROR_NOT_SUPPORTED);
    use_t list[PROCESSES_MAX];
    struct timespec now;
    int users = all_uses(found, list);
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long now_us = now.tv_sec * 1000000ULL + now.tv_nsec / 1000;
    if (!users || now_us <= since) return end(NVML_ERROR_NOT_FOUND);
    /* Two samples of each process, and one of nobody, as real drivers give. */
    unsigned int room = *size;
    *size = 2 * users + 1;
    if (!out || room < *size) return end(NVML_ERROR_INSUFFICIENT_SIZE);
    memset(out, 0, sizeof *out * *size);
    for (int i = 0; i < users; i++) {
        unsigned int util = list[i].util, spread = util < 10 ? util : util > 90 ? 100 - util : 10;
        out[2 * i] = (nvmlProcessUtilizationSample_t){list[i].pid, now_us - 1, util - spread, 0, 0, 0};
        out[2 * i + 1] = (nvmlProcessUtilizationSample_t){list[i].pid, now_us, util + spread, 0, 0, 0};
    }
    return end(NVML_SUCCESS);
}
