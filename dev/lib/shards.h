// shards.h: the files that training reads: patterns of paths, and the header of llm.c's shards.
//
// A shard is 256 int32 (magic, version, number of tokens), then the tokens, 16 or 32 bits wide.

static int compare_paths(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

// All files that match any of the patterns, sorted, without duplicates.
static char **match_files(const char *patterns, size_t *count, const char *flag) {
    char **paths = NULL;
    *count = 0;
    for (const char *p = patterns; *p; ) {
        size_t size = exists(p) ? strlen(p) : strcspn(p, ",");           // a name may have a comma
        char *pattern = strndup(p, size), **found = &pattern;
        size_t matches = 1;
        glob_t g;
        if (!exists(pattern)) {
            CHECK(!glob(pattern, 0, NULL, &g), "%s: no file matches '%s'; give text, or shards in "
                  "the format of llm.c", flag, pattern);
            found = g.gl_pathv, matches = g.gl_pathc;
        }
        paths = (char **)realloc(paths, (*count + matches)*sizeof(char *));
        for (size_t i = 0; i < matches; i++) paths[(*count)++] = found[i];
        p += size + (p[size] == ',');
    }
    CHECK(*count, "%s: no file is named", flag);
    qsort(paths, *count, sizeof(char *), compare_paths);
    size_t kept = 1;
    for (size_t i = 1; i < *count; i++)
        if (strcmp(paths[i], paths[kept - 1])) paths[kept++] = paths[i];
    *count = kept;
    return paths;
}

static int is_shard_name(const char *path) {
    size_t n = strlen(path);
    return (n > 4 && !strcmp(path + n - 4, ".bin")) || (n > 7 && !strcmp(path + n - 7, ".bin.gz"));
}

// Version and number of tokens from the header of a shard
static int shard_header(const char *path, size_t *tokens) {
    int32_t header[256] = { 0 };
    struct stat st;
    gzFile file = gzopen(path, "rb");
    CHECK(file && stat(path, &st) == 0, "%s: %s", path, strerror(errno));
    int got = gzread(file, header, sizeof header), packed = !gzdirect(file);
    gzclose(file);
    int version = header[0] == 20240520 && header[1] == 1 ? 1
                : header[0] == 20240801 && header[1] == 7 ? 7 : 0;
    CHECK(got == sizeof header && version, "%s: no header of an llm.c shard (expected the numbers "
          "20240520 and 1, or 20240801 and 7; found %d and %d); a headerless file of nanoGPT must "
          "be converted: dev/data/README.md", path, header[0], header[1]);
    CHECK(header[2] >= 0, "%s: its header says %d tokens", path, header[2]);
    *tokens = (size_t)header[2];
    size_t expected = sizeof header + *tokens*(version == 7 ? 4 : 2);
    CHECK(packed || (size_t)st.st_size == expected, "%s: %zu bytes, expected %zu for the %zu "
          "tokens of its header", path, (size_t)st.st_size, expected, *tokens);
    return version;
}

static void check_tokens(const char *path, const int *tokens, size_t count, size_t vocab) {
    for (size_t i = 0; i < count; i++)
        CHECK((size_t)(unsigned)tokens[i] < vocab, "%s: token %u at position %zu is outside the "
              "vocabulary of %zu; the data does not belong to this model or --tokenizer", path,
              (unsigned)tokens[i], i, vocab);
}

// The tokens of a shard, whose header said their version and number
static int *read_shard(const char *path, int version, size_t count, size_t vocab) {
    Bytes b = read_file(path);
    size_t width = version == 7 ? 4 : 2, expected = 1024 + count*width;
    CHECK(b.size == expected, "%s: %zu bytes, expected %zu for the %zu tokens of its header", path,
          b.size, expected, count);
    int *tokens = (int *)alloc(count, sizeof(int));
    for (size_t i = 0; i < count; i++) {
        uint32_t v = 0;
        memcpy(&v, b.data + 1024 + i*width, width);          // little-endian, as all our machines
        tokens[i] = (int)v;
    }
    free(b.data);
    check_tokens(path, tokens, count, vocab);
    return tokens;
}
