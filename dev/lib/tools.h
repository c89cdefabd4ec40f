// tools.h: errors, memory, text, files, random numbers and time.

static const char *program = "train_mamba2";
static __thread int in_background;      // this thread only writes a checkpoint

__attribute__((noreturn)) static void vdie(int status, const char *format, va_list args) {
    fflush(stdout);
    fprintf(stderr, "error: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    if (in_background) _exit(status);    // no handlers: the other thread is still at work
    exit(status);
}

// Bad input, file, shape or numerics: one sentence that names what was found, what was expected and
// what to do; exit status 1.
__attribute__((noreturn)) PRINTF(1, 2) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vdie(1, format, args);
}

// Wrong usage: exit status 2.
__attribute__((noreturn)) PRINTF(1, 2) static void die_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vdie(2, format, args);
}

static double now(void) {               // seconds
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9*(double)t.tv_nsec;
}

static size_t mul(size_t a, size_t b) {
    size_t product;
    CHECK(!__builtin_mul_overflow(a, b, &product), "a size of %zu x %zu overflows", a, b);
    return product;
}

// Memory aligned for vectors, not cleared: pages that nobody touches are never there. Large blocks
// ask for pages of 2 MB, which spare the many walks through page tables that matrices cost.
static void *alloc_work(size_t count, size_t size) {
    size_t page = mul(count, size) >= 8 << 20 ? 2 << 20 : 64, bytes;
    bytes = (count*size + 64 + page - 1)/page*page;
    void *p = aligned_alloc(page, bytes);
    if (p && page > 64) madvise(p, bytes, MADV_HUGEPAGE);
    CHECK(p, "out of memory: %zu bytes (%.2f GiB) could not be had; try a smaller --batch or "
          "--seq-len, or --recompute", bytes, (double)bytes/(1 << 30));
    return p;
}

// The same, cleared. Both are released by free().
static void *alloc(size_t count, size_t size) {
    return memset(alloc_work(count, size), 0, count*size);
}

static real *alloc_reals(size_t count) { return (real *)alloc(count, sizeof(real)); }

typedef struct { char *data; size_t size, room; } Text;      // a string that grows

static void reserve(Text *t, size_t more) {                  // room for so many and a 0
    if (t->size + more + 1 <= t->room) return;
    t->room = 2*(t->size + more + 64);
    t->data = (char *)realloc(t->data, t->room);
    CHECK(t->data, "out of memory: %zu bytes of text", t->room);
}

PRINTF(2, 3) static void put(Text *t, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    size_t more = (size_t)vsnprintf(NULL, 0, format, args);
    reserve(t, more);
    vsnprintf(t->data + t->size, more + 1, format, again);
    t->size += more;
    va_end(args);
    va_end(again);
}

static void put_bytes(Text *t, const void *data, size_t size) {
    if (!size) return;
    reserve(t, size);
    memcpy(t->data + t->size, data, size);
    t->data[t->size += size] = 0;
}

// A path or another short string put together by printf; lives until the 16th call after it in its
// thread.
PRINTF(1, 2) static const char *str(const char *format, ...) {
    static __thread char ring[16][2*PATH_MAX];
    static __thread int turn;
    char *s = ring[turn++ % 16];
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof ring[0], format, args);
    va_end(args);
    return s;
}

typedef struct { char *data; size_t size; } Bytes;

// The whole of a file, unpacked if it is gzip'ed, with a zero byte behind its end.
static Bytes read_file(const char *path) {
    struct stat st;
    CHECK(stat(path, &st) == 0, "%s: %s", path, strerror(errno));
    CHECK(!S_ISDIR(st.st_mode), "%s is a directory, expected a file", path);
    gzFile file = gzopen(path, "rb");
    CHECK(file, "%s: %s", path, strerror(errno));
    Bytes b = { NULL, 0 };
    for (size_t room = (size_t)st.st_size + 1;; room *= 2) {
        b.data = (char *)realloc(b.data, room + 1);
        CHECK(b.data, "%s: out of memory for its %zu bytes", path, room);
        while (b.size < room) {
            size_t want = room - b.size < 1 << 30 ? room - b.size : 1 << 30;
            int got = gzread(file, b.data + b.size, (unsigned)want);
            int code;
            CHECK(got >= 0, "%s: %s; the file is damaged", path, gzerror(file, &code));
            if (!got) break;
            b.size += (size_t)got;
        }
        if (b.size < room) break;
    }
    CHECK(gzclose(file) == Z_OK, "%s ends in the middle of its gzip stream: it is cut off", path);
    b.data[b.size] = 0;
    return b;
}

// The crc32 of more bytes, however many (zlib takes 32 bits at a time), after those of `crc`
static uint32_t crc_of(uint32_t crc, const void *data, size_t size) {
    for (size_t at = 0, piece; at < size; at += piece) {
        piece = size - at < 1 << 30 ? size - at : 1 << 30;
        crc = (uint32_t)crc32(crc, (const Bytef *)data + at, (uInt)piece);
    }
    return crc;
}

// A file being written, with the crc32 of what went into it. All failures end the program.
typedef struct { const char *path; int fd; uint32_t crc; size_t size; } Output;

static Output output_open(const char *path) {
    Output o = { path, open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), 0, 0 };
    CHECK(o.fd >= 0, "%s: could not create: %s", path, strerror(errno));
    return o;
}

static void output(Output *o, const void *data, size_t size) {
    for (const char *p = (const char *)data, *end = p + size; p < end; ) {
        size_t piece = (size_t)(end - p) < 1 << 26 ? (size_t)(end - p) : 1 << 26;
        ssize_t done = write(o->fd, p, piece);
        if (done < 0 && errno == EINTR) continue;
        CHECK(done > 0, "%s: could not write: %s", o->path, strerror(errno));
        o->crc = crc_of(o->crc, p, (size_t)done);
        o->size += (size_t)done, p += done;
    }
}

static void output_close(const Output *o) {                  // on the disk, not just in its cache
    CHECK(fsync(o->fd) == 0 || errno == EINVAL, "%s: %s", o->path, strerror(errno));
    CHECK(close(o->fd) == 0, "%s: %s", o->path, strerror(errno));
}

static Output write_file(const char *path, const void *data, size_t size) {
    Output o = output_open(path);
    output(&o, data, size);
    output_close(&o);
    return o;
}

static void sync_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(fd >= 0 && fsync(fd) == 0, "%s: %s", path, strerror(errno));
    close(fd);
}

static int exists(const char *path) { struct stat st; return stat(path, &st) == 0; }

static int remove_entry(const char *path, const struct stat *st, int kind, struct FTW *at) {
    (void)st, (void)kind, (void)at;
    return remove(path);
}

// A directory with all that is in it; nothing happens when there is none.
static void remove_tree(const char *path) { nftw(path, remove_entry, 16, FTW_DEPTH | FTW_PHYS); }

static const char *human(double x) {
    return x >= 1e9 ? str("%.1fG", x/1e9) : x >= 1e6 ? str("%.1fM", x/1e6)
         : x >= 1e4 ? str("%.1fK", x/1e3) : str("%.0f", x);
}

static const char *duration(double s) {
    long t = (long)(s + 0.5);
    return t >= 3600 ? str("%ld:%02ld:%02ld", t/3600, t/60%60, t%60) : str("%ld:%02ld", t/60, t%60);
}

// Random numbers without a state: the i-th number of a stream is a hash of (seed, stream, i), so
// that any thread can make any number and a resumed run goes on with the same ones.
static uint64_t hash64(uint64_t x) {                         // splitmix64's finalizer
    x = (x ^ x >> 30)*0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27)*0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t i) {
    return hash64(hash64(hash64(seed + 0x9e3779b97f4a7c15u) + stream) + i*0x9e3779b97f4a7c15u);
}

static double random_uniform(uint64_t seed, uint64_t stream, uint64_t i) {       // in (0, 1)
    return ((double)(random_bits(seed, stream, i) >> 12) + 0.5)/4503599627370496.0;
}

static double random_normal(uint64_t seed, uint64_t stream, uint64_t i) {
    double u = random_uniform(seed, stream, 2*i), v = random_uniform(seed, stream, 2*i + 1);
    return sqrt(-2*log(u))*cos(6.283185307179586*v);
}

// Where the time of a step goes: lap("conv1d") charges the time since the last lap to "conv1d".
typedef struct { const char *name; double seconds; } Lap;
static Lap laps[32];
static double last_lap;

static void lap(const char *name) {
    double t = now();
    size_t i = 0;
    while (laps[i].name && strcmp(laps[i].name, name)) i++;
    laps[i].name = name;
    laps[i].seconds += t - last_lap;
    last_lap = t;
}
