// == JSON =========================================================================================
// A parsed document is one block: its nodes in the order of the text, then a copy of the text, its
// strings unescaped in place. A node's span counts the nodes in it and itself: node + span is its
// next sibling. A key is a node too; its value is key + 1, inside its span.
//     {"a": [1, 2], "b": 3}    nodes   {...}   "a"   [...]   1   2   "b"   3
//                              spans     7      4      3     1   1    2    1

typedef enum {
    JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT
} JsonKind;

typedef struct Json {
    const char *text;                // a string's bytes and a 0; anything else as it is written
    uint32_t size : 29, kind : 3;    // bytes of a string or a number; JsonKind
    uint32_t span;
} Json;

// The elements of an array, or the keys of an object.
#define JSON_EACH(child, parent) \
    for (const Json *child = (parent) + 1; child < (parent) + (parent)->span; child += child->span)

// The length of the UTF-8 character at s, and its code point; 0 when it is not a valid one.
static size_t utf8_decode(const char *s, const char *end, uint32_t *code) {
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };    // below, it is overlong
    unsigned char c = (unsigned char)*s;
    size_t n = c < 0x80 ? 1 : c < 0xC0 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF8 ? 4 : 0;
    if (n == 0 || (size_t)(end - s) < n)
        return 0;
    *code = n == 1 ? c : c & (0x7Fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xC0) != 0x80)
            return 0;
        *code = *code << 6 | (s[i] & 0x3F);
    }
    int surrogate = *code >= 0xD800 && *code < 0xE000;
    return *code < least[n] || *code > 0x10FFFF || surrogate ? 0 : n;
}

static size_t utf8_encode(char *out, uint32_t code) {
    size_t n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, code >>= 6)
        out[i] = (char)(0x80 | (code & 0x3F));
    out[0] = (char)(n == 1 ? code : (0xF00u >> n) | code);    // the lead byte has n leading ones
    return n;
}

typedef struct {
    const char *path, *start, *end;    // the copy of the text; *end is 0
    char *at;
    Json *free_node;
    int depth;
} JsonParser;

#define JSON_CHECK(ok, p, expected) CHECK(ok, "%s: bad JSON at byte %zu: expected %s", \
                                          (p)->path, (size_t)((p)->at - (p)->start), expected)

static char json_peek(JsonParser *p)    // the next character that is not white space
{
    while (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r')
        p->at++;
    return *p->at;
}

static uint32_t json_hex4(JsonParser *p) {
    char digits[5] = { 0 };
    memcpy(digits, p->at, 4);    // the copy ends with 4 zeros
    JSON_CHECK(strspn(digits, "0123456789abcdefABCDEF") == 4, p, "four hexadecimal digits");
    p->at += 4;
    return (uint32_t)strtoul(digits, NULL, 16);
}

static uint32_t json_escape(JsonParser *p)    // what follows a backslash
{
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const char *letter = *p->at ? strchr(letters, *p->at) : NULL;
    JSON_CHECK(letter || *p->at == 'u', p, "one of \"\\/bfnrtu after a backslash");
    p->at++;
    if (letter)
        return (uint32_t)meanings[letter - letters];
    uint32_t code = json_hex4(p);
    if (code >= 0xD800 && code < 0xDC00 && p->at[0] == '\\' && p->at[1] == 'u') {
        p->at += 2;
        uint32_t low = json_hex4(p);
        if (low >= 0xDC00 && low < 0xE000)
            code = 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
    }
    JSON_CHECK(code && (code < 0xD800 || code >= 0xE000), p, "no zero byte, no lone surrogate");
    return code;
}

static void json_read_string(JsonParser *p, Json *node) {
    JSON_CHECK(json_peek(p) == '"', p, "a string");
    char *out = ++p->at;    // stays behind p->at: an escape is longer than what it stands for
    node->kind = JSON_STRING;
    node->text = out;
    while (*p->at != '"') {
        uint32_t code = 0;
        size_t length = utf8_decode(p->at, p->end, &code);
        JSON_CHECK(length && code >= 0x20, p, "UTF-8 without control characters up to a quote");
        p->at += length;
        out += utf8_encode(out, code == '\\' ? json_escape(p) : code);
    }
    node->size = (uint32_t)(out - node->text);
    *out = 0;
    p->at++;
}

static void json_digits(JsonParser *p) {
    JSON_CHECK(*p->at >= '0' && *p->at <= '9', p, "a value");
    while (*p->at >= '0' && *p->at <= '9')
        p->at++;
}

// A word, also those that Python writes for floats that are not finite, or a number.
static void json_read_scalar(JsonParser *p, Json *node) {
    static const char *const words[] = { "null", "false", "true", "NaN", "Infinity", "-Infinity" };
    node->text = p->at;
    node->kind = JSON_NUMBER;
    size_t w = 0;
    while (w < 6 && strncmp(p->at, words[w], strlen(words[w])))
        w++;
    if (w < 6) {
        node->kind = w < JSON_NUMBER ? (JsonKind)w : JSON_NUMBER;
        p->at += strlen(words[w]);
    } else {
        p->at += *p->at == '-';
        if (*p->at == '0')
            p->at++;
        else
            json_digits(p);
        if (*p->at == '.') {
            p->at++;
            json_digits(p);
        }
        if (*p->at == 'e' || *p->at == 'E') {
            p->at++;
            p->at += *p->at == '+' || *p->at == '-';
            json_digits(p);
        }
    }
    node->size = (uint32_t)(p->at - node->text);
}

static int json_compare(const void *a, const void *b)    // of two strings, for qsort and bsearch
{
    const Json *x = *(const Json *const *)a, *y = *(const Json *const *)b;
    return x->size != y->size ? (x->size < y->size ? -1 : 1) : memcmp(x->text, y->text, x->size);
}

// The children of a node, sorted when they are strings; free() the array.
static const Json **json_sorted(const Json *parent, size_t *count) {
    const Json **children = (const Json **)alloc(parent->span, sizeof *children);
    *count = 0;
    JSON_EACH(child, parent)
        children[(*count)++] = child;
    qsort(children, *count, sizeof *children, json_compare);
    return children;
}

static void json_refuse_duplicates(const JsonParser *p, const Json *object) {
    size_t n;
    const Json **keys = json_sorted(object, &n);
    for (size_t i = 1; i < n; i++)
        CHECK(json_compare(&keys[i - 1], &keys[i]),
              "%s: bad JSON: an object has the key \"%s\" twice", p->path, keys[i]->text);
    free(keys);
}

static void json_read_value(JsonParser *p) {
    Json *node = p->free_node++;
    char open = json_peek(p), close = open == '{' ? '}' : ']';
    if (open == '"') {
        json_read_string(p, node);
    } else if (open != '{' && open != '[') {
        json_read_scalar(p, node);
    } else {
        node->kind = open == '{' ? JSON_OBJECT : JSON_ARRAY;
        node->text = p->at++;
        JSON_CHECK(++p->depth <= 64, p, "at most 64 levels");
        for (int more = json_peek(p) != close; more; p->at += more) {
            Json *child = p->free_node;
            if (open == '{') {
                json_read_string(p, p->free_node++);
                JSON_CHECK(json_peek(p) == ':', p, "a colon");
                p->at++;
            }
            json_read_value(p);
            child->span = (uint32_t)(p->free_node - child);
            more = json_peek(p) == ',';
        }
        JSON_CHECK(*p->at == close, p, open == '{' ? "a comma or }" : "a comma or ]");
        p->at++;
        p->depth--;
    }
    node->span = (uint32_t)(p->free_node - node);
    if (node->kind == JSON_OBJECT && node->span > 3)    // more than one key
        json_refuse_duplicates(p, node);
}

// The root of a document; path is for errors. json_free() it.
static Json *json_parse(const char *path, const char *text, size_t size) {
    CHECK(size < 1u << 29, "%s: %zu bytes of JSON; expected less than 512 MiB", path, size);
    size_t nodes = 1;    // and at most one behind each of ,:[{ outside of strings
    int quoted = 0;
    for (size_t i = 0; i < size; i++) {
        nodes += !quoted && (text[i] == ',' || text[i] == ':' || text[i] == '[' || text[i] == '{');
        quoted ^= text[i] == '"';
        i += quoted && text[i] == '\\';
    }
    Json *root = (Json *)alloc(mul(nodes, sizeof *root) + size + 4, 1);
    char *copy = (char *)memcpy(root + nodes, text, size);
    JsonParser p = { path, copy, copy + size, copy, root, 0 };
    json_read_value(&p);
    json_peek(&p);
    JSON_CHECK(p.at == p.end, &p, "nothing behind the document");
    return root;
}

static void json_free(Json *root) {
    free(root);
}

// Looking up: a key that is absent and one that is null are the same; path and name are for errors.
static const Json *json_get(const Json *object, const char *key)    // NULL when absent
{
    if (object && object->kind == JSON_OBJECT)
        JSON_EACH(k, object)
            if (k->size == strlen(key) && !memcmp(k->text, key, k->size))
                return k[1].kind == JSON_NULL ? NULL : k + 1;
    return NULL;
}

static const Json *json_expect(const Json *node, JsonKind kind, const char *path,
                               const char *name) {
    static const char *const kinds[] = {
        "null", "false", "true", "a number", "a string", "an array", "an object"
    };
    CHECK(node && node->kind == kind, "%s: \"%s\" is %s; expected %s", path, name,
          node ? kinds[node->kind] : "missing", kinds[kind]);
    return node;
}

// A number; transformers 5 writes {"__float__": "Infinity"} where 4 writes Infinity.
static double json_double(const Json *node, const char *path, const char *name) {
    const Json *special = json_get(node, "__float__");
    if (!special)
        return strtod(json_expect(node, JSON_NUMBER, path, name)->text, NULL);
    char *end;
    const char *text = json_expect(special, JSON_STRING, path, name)->text;
    double x = strtod(text, &end);
    CHECK(*text && !*end, "%s: \"%s\" is \"%s\"; expected a number", path, name, text);
    return x;
}

static size_t json_size(const Json *node, const char *path, const char *name) {
    double x = json_double(node, path, name);
    CHECK(x >= 0 && x <= 9007199254740992.0 && x == floor(x),
          "%s: \"%s\" is %g; expected a whole number, at least 0", path, name, x);
    return (size_t)x;
}

static double json_number(const Json *object, const char *path, const char *key, double fallback) {
    const Json *node = json_get(object, key);
    return node ? json_double(node, path, key) : fallback;
}

static const char *json_string(const Json *object, const char *path, const char *key,
                               const char *fallback) {
    const Json *node = json_get(object, key);
    return node ? json_expect(node, JSON_STRING, path, key)->text : fallback;
}

static int json_bool(const Json *object, const char *path, const char *key, int fallback) {
    const Json *node = json_get(object, key);
    if (!node)
        return fallback;
    CHECK(node->kind == JSON_TRUE || node->kind == JSON_FALSE,
          "%s: \"%s\" is neither true nor false", path, key);
    return node->kind == JSON_TRUE;
}

// Writes a string in quotes; a byte that is not UTF-8 becomes U+FFFD.
static void put_json_string(Text *t, const char *s, size_t n) {
    const char *end = s + n;
    put(t, "\"");
    while (s < end) {
        uint32_t code = 0;
        size_t length = utf8_decode(s, end, &code);
        if (length == 0 || code < 0x20)
            put(t, "\\u%04x", length ? (unsigned)code : 0xFFFDu);
        else
            put(t, "%s%.*s", code == '"' || code == '\\' ? "\\" : "", (int)length, s);
        s += length ? length : 1;
    }
    put(t, "\"");
}
