// log.h: log.jsonl and the curves that are drawn from it.

typedef struct { Point *points; size_t count, room; } Curve;

static void curve_add(Curve *c, double x, double y) {
    if (c->count == c->room) {
        c->room = 2*c->room + 256;
        c->points = (Point *)realloc(c->points, c->room*sizeof(Point));
        CHECK(c->points, "out of memory: %zu points of a curve", c->room);
    }
    c->points[c->count].x = x, c->points[c->count++].y = y;
}

// The number behind a key of a line of the log, or NAN
static double log_number(const char *line, const char *end, const char *key) {
    const char *found = strstr(line, key);
    return found && found < end ? strtod(found + strlen(key), NULL) : NAN;
}

// The lines of a log up to a step, which a resumed run keeps; the curves get their points back.
static Text log_kept(const char *path, double last, Curve *train, Curve *val) {
    Text kept = { NULL, 0, 0 };
    Bytes b = read_file(path);
    for (char *line = b.data, *end; (end = strchr(line, '\n')); line = end + 1) {
        double step = log_number(line, end, "{\"step\":");
        double loss = log_number(line, end, "\"loss\":");
        double val_loss = log_number(line, end, "\"val_loss\":");
        if (step > last) continue;
        put_bytes(&kept, line, (size_t)(end - line) + 1);
        if (isfinite(loss)) curve_add(train, step, loss);
        if (isfinite(val_loss)) curve_add(val, step, val_loss);
    }
    free(b.data);
    return kept;
}
