// directory.h: what makes a directory of checkpoints safe: checksums, links, a lock.
//
// checksums.txt has a line "crc32 size name" for each file of a checkpoint, and one for itself.

// ---- writing ------------------------------------------------------------------------------------
static void finish_file(Text *sums, const char *name, Output o) {
    put(sums, "%08x %zu %s\n", o.crc, o.size, name);
}

static void finish_text(Text *sums, const char *dir, const char *name, Text *t) {
    finish_file(sums, name, write_file(str("%s/%s", dir, name), t->data, t->size));
    free(t->data);
    memset(t, 0, sizeof *t);
}

static void finish_tensors(Text *sums, const char *dir, const char *name, Tensors *t) {
    finish_file(sums, name, tensors_write(str("%s/%s", dir, name), t));
    free(t->list);
    memset(t, 0, sizeof *t);
}

static void point_link(const char *link, const char *target) {           // link -> target, at once
    const char *aside = str("%s.new", link);
    unlink(aside);
    CHECK(symlink(target, aside) == 0 && rename(aside, link) == 0, "%s: could not point to %s: %s",
          link, target, strerror(errno));
}

// ---- finding and checking -----------------------------------------------------------------------
static int compare_steps(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// The steps that OUT has checkpoints of, newest first
static int64_t *list_checkpoints(const char *out, size_t *count) {
    int64_t *steps = (int64_t *)alloc(1, sizeof(int64_t));
    DIR *d = opendir(out);
    *count = 0;
    for (struct dirent *e; d && (e = readdir(d)); ) {
        char *end;
        if (strncmp(e->d_name, "step_", 5)) continue;
        int64_t step = strtoll(e->d_name + 5, &end, 10);
        if (end == e->d_name + 5 || *end) continue;
        steps = (int64_t *)realloc(steps, (*count + 1)*sizeof(int64_t));
        steps[(*count)++] = step;
    }
    if (d) closedir(d);
    qsort(steps, *count, sizeof(int64_t), compare_steps);
    return steps;
}

static const char *link_target(const char *link) {
    static char target[PATH_MAX];
    ssize_t n = readlink(link, target, sizeof target - 1);
    target[n > 0 ? n : 0] = 0;
    return target;
}

// What is wrong with a checkpoint's files, or NULL
static const char *checkpoint_fault(const char *dir) {
    const char *path = str("%s/checksums.txt", dir), *fault = NULL;
    unsigned crc;
    size_t size;
    char name[64];
    if (!exists(path)) return "checksums.txt is missing";
    Bytes sums = read_file(path);
    char *own = strstr(sums.data, " checksums\n");           // first its own line, the last
    while (own && own > sums.data && own[-1] != '\n') own--;
    size_t before = own ? (size_t)(own - sums.data) : 0;
    if (!own || sscanf(own, "%8x %zu %63s", &crc, &size, name) != 3 || size != before
        || crc != crc_of(0, sums.data, before) || strchr(own, '\n') + 1 != sums.data + sums.size)
        fault = "checksums.txt is damaged";
    for (char *line = sums.data; !fault && line < own; line = strchr(line, '\n') + 1) {
        int fields = sscanf(line, "%8x %zu %63s", &crc, &size, name);
        const char *file = str("%s/%s", dir, name);
        if (fields != 3 || !exists(file)) fault = str("%s is missing", name);
        if (fault) break;
        Bytes b = map_file(file);
        if (b.size != size || crc_of(0, b.data, b.size) != crc) fault = str("%s is damaged", name);
        if (b.size) munmap(b.data, b.size);
    }
    free(sums.data);
    return fault;
}

// Of the checkpoints up to this step the newest `keep` stay (0: all), and the best. (Newer ones are
// damaged, or this run would have gone on from them.)
static void prune_checkpoints(const char *out, int64_t keep, int64_t step) {
    size_t count, kept = 0;
    int64_t *steps = list_checkpoints(out, &count);
    const char *best = link_target(str("%s/best", out));
    for (size_t i = 0; i < count && keep; i++) {
        char *dir = strdup(str("%s/step_%08" PRId64, out, steps[i]));
        if (steps[i] <= step && (int64_t)++kept > keep && strcmp(strrchr(dir, '/') + 1, best))
            remove_tree(dir);
        free(dir);
    }
    free(steps);
}

// The newest good checkpoint in `out`, or NULL when there is none; a warning for each damaged one
static char *find_checkpoint(const char *out) {
    size_t count;
    int64_t *steps = list_checkpoints(out, &count);
    for (size_t i = 0; i < count; i++) {
        char *dir = strdup(str("%s/step_%08" PRId64, out, steps[i]));
        const char *fault = checkpoint_fault(dir);
        if (!fault) return free(steps), dir;
        fprintf(stderr, "warning: %s is not used: %s\n", dir, fault);
        free(dir);
    }
    free(steps);
    CHECK(!count, "--resume: all %zu checkpoints in %s are damaged; start again in another --out, "
          "or with --init from one whose model.safetensors is whole", count, out);
    return NULL;
}

// A second trainer in the same directory would destroy the first one's work. The lock goes with the
// process; OUT/lock says who holds it.
static void lock_out(const char *out) {
    CHECK(mkdir(out, 0777) == 0 || errno == EEXIST, "--out %s: could not create: %s",
          out, strerror(errno));
    char *path = strdup(str("%s/lock", out)), host[64] = "this host";
    int fd = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0, "--out %s: %s", out, strerror(errno));
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        const char *holder = exists(path) ? read_file(path).data : "another process";
        die("--out %s is in use by %s; wait for it or choose another directory", out, holder);
    }
    gethostname(host, sizeof host - 1);
    const char *text = str("process %d on %s", (int)getpid(), host);
    write_file(path, text, strlen(text));
    free(path);
}
