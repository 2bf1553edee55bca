#include "write_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>

#include <fcntl.h>
#include <unistd.h>

#include "check.h"

namespace faiss_saap {

namespace {

class StdioSink : public FileSink {
   public:
    StdioSink(const std::string& path, FILE* file) : path_(path), file_(file) {}
    void write(const void* data, size_t bytes) override {
        FAISS_THROW_IF_NOT_FMT(
                bytes == 0 || fwrite(data, 1, bytes, file_) == bytes,
                "%s: cannot be written: %s",
                path_.c_str(),
                std::strerror(errno));
    }

   private:
    const std::string& path_;
    FILE* file_;
};

} // namespace

void write_file(
        const std::string& path,
        const std::function<void(FileSink&)>& body) {
    int fd = -1;
    std::string temporary;
    std::random_device random;
    do {
        temporary = path + ".tmp" + std::to_string(random());
        fd = open(
                temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd < 0 && errno == EEXIST);
    FAISS_THROW_IF_NOT_FMT(
            fd >= 0,
            "%s: cannot be created: %s",
            path.c_str(),
            std::strerror(errno));
    FILE* file = fdopen(fd, "wb");
    try {
        StdioSink sink(path, file);
        body(sink);
        const bool flushed = fflush(file) == 0 && fsync(fd) == 0;
        FAISS_THROW_IF_NOT_FMT(
                flushed,
                "%s: cannot be written: %s",
                path.c_str(),
                std::strerror(errno));
    } catch (...) {
        fclose(file);
        unlink(temporary.c_str());
        throw;
    }
    fclose(file);
    if (rename(temporary.c_str(), path.c_str()) != 0) {
        const int error = errno;
        unlink(temporary.c_str());
        FAISS_THROW_FMT(
                "%s: cannot be created: %s",
                path.c_str(),
                std::strerror(error));
    }
}

} // namespace faiss_saap
