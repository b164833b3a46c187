/* The state of the stand-in: a JSON file that is read anew at every call, and files locked with fcntl, each a live
   process that uses a GPU. */
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NODES_MAX = 8192, BYTES_MAX = 1 << 18, PROCESSES_MAX = 256 };

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
        if (node->key && !strcmp(node->key, key)) return node;
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

/* ---- the state ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static node_t *state;

/* Reads the state. False if there is none: the driver is not loaded. */
static int load(void) {
    const char *path = getenv("FAKE_NVML");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t length = file >= 0 ? read(file, bytes, BYTES_MAX - 1) : -1;
    if (file >= 0) close(file);
    if (length <= 0) return 0;
    bytes[length] = 0;
    at = bytes;
    node_count = 0;
    state = value(NULL);
    return 1;
}

/* What `from` makes the function answer, 0 for nothing. `hang` is a name or a list of them: it never answers. */
static int injected(node_t *from, const char *function) {
    node_t *hang = get(from, "hang");
    if (hang && hang->text && !strcmp(hang->text, function))
        for (;;) pause();
    for (node_t *one = hang ? hang->child : NULL; one; one = one->next)
        if (one->text && !strcmp(one->text, function))
            for (;;) pause();
    return (int)number(get(from, "fail"), function, 0);
}

/* The processes that use a GPU or a part: those of the state, then those that hold a lock in the ledger. */
static int uses(node_t *of, use_t *out, int found) {
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
        /* The kernel tells the holder's pid in the reader's namespace: of a container too, as drivers do. */
        struct flock holder = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        ssize_t length = read(file, line, sizeof line - 1);
        if (length > 0 && !fcntl(file, F_GETLK, &holder) && holder.l_type != F_UNLCK && holder.l_pid > 0) {
            char flag[8] = "";
            line[length] = 0;
            out[found] = (use_t){.pid = holder.l_pid};
            if (sscanf(line, "%llu %u %7s", &out[found].memory, &out[found].util, flag) >= 2) {
                out[found].mps = !strcmp(flag, "mps");
                found++;
            }
        }
        close(file);
    }
    closedir(folder);
    return found;
}
