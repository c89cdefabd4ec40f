// ================================================================================================
// Files of tensors: safetensors
// ================================================================================================
// A u64 with the size of a JSON header, the header, then the tensors' bytes, little-endian and
// without gaps. An entry of the header: "name": {"dtype", "shape", "data_offsets": [begin, end]}.

typedef struct { char name[112]; size_t rank, shape[5], count; real *data; } Tensor;
typedef struct { Tensor *list; size_t count, room; } Tensors;

static void tensors_add(Tensors *t, const char *name, size_t rank, const size_t *shape,
                        real *data) {
    if (t->count == t->room) {
        t->room = 2*t->room + 64;
        t->list = (Tensor *)realloc(t->list, t->room*sizeof(Tensor));
        CHECK(t->list, "out of memory: %zu names of tensors", t->room);
    }
    Tensor *x = &t->list[t->count++];
    memset(x, 0, sizeof *x);
    snprintf(x->name, sizeof x->name, "%s", name);
    x->rank = rank, x->count = 1, x->data = data;
    for (size_t i = 0; i < rank; i++) x->count *= x->shape[i] = shape[i];
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

static Output tensors_write(const char *path, Tensors *t) {
    Text header = { NULL, 0, 0 };
    size_t at = 0;
    qsort(t->list, t->count, sizeof(Tensor), compare_names);
    put(&header, "{\"__metadata__\":{\"format\":\"pt\"}");  // transformers demands this entry
    for (size_t i = 0; i < t->count; i++) {
        const Tensor *x = &t->list[i];
        size_t end = at + x->count*sizeof(real);
        put(&header, ",\"%s\":{\"dtype\":\"F%zu\",\"shape\":[", x->name, 8*sizeof(real));
        for (size_t k = 0; k < x->rank; k++) put(&header, "%s%zu", k ? "," : "", x->shape[k]);
        put(&header, "],\"data_offsets\":[%zu,%zu]}", at, end);
        at = end;
    }
    put(&header, "}");
    while (header.size % 8) put(&header, " ");
    uint64_t size = header.size;
    Output o = output_open(path);
    output(&o, &size, 8);
    output(&o, header.data, header.size);
    for (size_t i = 0; i < t->count; i++)
        output(&o, t->list[i].data, t->list[i].count*sizeof(real));
    output_close(&o);
    free(header.data);
    return o;
}

typedef struct { const char *path; char *data; size_t size, start; Json *header; } TensorFile;

typedef struct { size_t begin, end; } Range;
static int compare_ranges(const void *a, const void *b) {
    const Range *x = (const Range *)a, *y = (const Range *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static size_t dtype_size(const char *dtype) {
    static const char *const names[] = { "F64", "F32", "F16", "BF16" };
    static const size_t sizes[] = { 8, 4, 2, 2 };
    for (size_t i = 0; i < 4; i++) if (!strcmp(dtype, names[i])) return sizes[i];
    return 0;
}

static Range tensor_range(const TensorFile *f, const Json *entry, const char *name) {
    const Json *offsets = json_expect(json_get(entry, "data_offsets"), JSON_ARRAY, f->path, name);
    CHECK(offsets->span == 3, "%s: %s has no two data_offsets", f->path, name);
    Range r = { json_size(offsets + 1, f->path, name), json_size(offsets + 2, f->path, name) };
    CHECK(r.begin <= r.end && r.end <= f->size - f->start, "%s: %s lies at bytes %zu to %zu, "
          "beyond the end: the file is cut off or damaged", f->path, name, r.begin, r.end);
    return r;
}

// The bytes of a file without reading them yet; released by munmap.
static Bytes map_file(const char *path) {
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0 && fstat(fd, &st) == 0, "%s: %s", path, strerror(errno));
    Bytes b = { NULL, (size_t)st.st_size };
    if (b.size) b.data = (char *)mmap(NULL, b.size, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(b.data != (char *)MAP_FAILED, "%s: could not map: %s", path, strerror(errno));
    close(fd);
    return b;
}

// Maps a file of tensors and checks its header: the tensors must tile the file exactly.
static TensorFile tensor_file_open(const char *path) {
    Bytes b = map_file(path);
    TensorFile f = { path, b.data, b.size, 0, NULL };
    CHECK(f.size >= 10, "%s: %zu bytes are no safetensors file", path, f.size);
    uint64_t header;
    memcpy(&header, f.data, 8);
    CHECK(header <= 100000000 && header <= f.size - 8, "%s: a header of %" PRIu64 " bytes in a "
          "file of %zu: no safetensors file, or cut off", path, header, f.size);
    f.start = 8 + (size_t)header;
    f.header = json_parse(path, f.data + 8, (size_t)header);
    json_expect(f.header, JSON_OBJECT, path, "header");
    size_t count = 0, end = 0;
    JSON_EACH(key, f.header) count++;
    Range *ranges = (Range *)alloc(count, sizeof(Range));
    count = 0;
    JSON_EACH(key, f.header)
        if (strcmp(key->text, "__metadata__")) ranges[count++] = tensor_range(&f, key + 1,
                                                                              key->text);
    qsort(ranges, count, sizeof(Range), compare_ranges);
    for (size_t i = 0; i < count; i++) {
        CHECK(ranges[i].begin == end, "%s: tensors overlap or leave a gap at byte %zu", path, end);
        end = ranges[i].end;
    }
    CHECK(end == f.size - f.start, "%s: %zu bytes behind the last tensor", path,
          f.size - f.start - end);
    free(ranges);
    return f;
}

static void tensor_file_close(TensorFile *f) {
    munmap(f->data, f->size);
    json_free(f->header);
}

static double half_value(uint16_t h) {                       // IEEE half precision
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent == 31 ? (fraction ? NAN : INFINITY)
             : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return h >> 15 ? -v : v;
}

// Checks that an entry of a file has the shape of x and a type that is read, and returns its bytes.
static const char *tensor_bytes(const TensorFile *f, const Json *entry, const Tensor *x,
                                const char **dtype) {
    const Json *shape = json_expect(json_get(entry, "shape"), JSON_ARRAY, f->path, x->name);
    Text found = { NULL, 0, 0 }, want = { NULL, 0, 0 };
    put(&found, "shape"), put(&want, "shape");
    JSON_EACH(s, shape) put(&found, " %.*s", (int)s->size, s->text);
    for (size_t i = 0; i < x->rank; i++) put(&want, " %zu", x->shape[i]);
    CHECK(!strcmp(found.data, want.data), "%s: %s has %s, expected %s", f->path, x->name,
          found.data,
          want.data);
    free(found.data), free(want.data);
    *dtype = json_string(entry, f->path, "dtype", "nothing");
    size_t size = dtype_size(*dtype);
    Range r = tensor_range(f, entry, x->name);
    CHECK(size, "%s: %s has the type %s, expected F32, F64, F16 or BF16", f->path, x->name, *dtype);
    CHECK(r.end - r.begin == x->count*size, "%s: %s takes %zu bytes, expected %zu", f->path,
          x->name,
          r.end - r.begin, x->count*size);
    return f->data + f->start + r.begin;
}

static double tensor_element(const char *bytes, const char *dtype, size_t i) {
    double wide;
    float single;
    uint32_t bits;
    uint16_t half;
    if (!strcmp(dtype, "F64")) return memcpy(&wide, bytes + 8*i, 8), wide;
    if (!strcmp(dtype, "F32")) return memcpy(&single, bytes + 4*i, 4), (double)single;
    memcpy(&half, bytes + 2*i, 2);
    if (!strcmp(dtype, "F16")) return half_value(half);
    bits = (uint32_t)half << 16;                             // BF16: the upper half of a float
    return memcpy(&single, &bits, 4), (double)single;
}

static void tensor_read(const TensorFile *f, const Json *entry, const Tensor *x) {
    const char *dtype, *bytes = tensor_bytes(f, entry, x, &dtype);
    PARALLEL_FOR
    for (size_t i = 0; i < x->count; i++) x->data[i] = (real)tensor_element(bytes, dtype, i);
}

static void tensor_doubles(const TensorFile *f, const Json *entry, const Tensor *x, double *out) {
    const char *dtype, *bytes = tensor_bytes(f, entry, x, &dtype);
    for (size_t i = 0; i < x->count; i++) out[i] = tensor_element(bytes, dtype, i);
}

