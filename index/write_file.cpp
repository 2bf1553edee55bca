#include "write_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
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

struct Close {
    void operator()(FILE* file) const {
        fclose(file);
    }
};

/// Runs the body on a file that is open for writing, and closes it.
/// @param synced  wait until all bytes are on disk
void write_to(
        int fd,
        const std::string& path,
        bool synced,
        const std::function<void(FileSink&)>& body) {
    const std::unique_ptr<FILE, Close> file(fdopen(fd, "wb"));
    StdioSink sink(path, file.get());
    body(sink);
    const bool flushed = fflush(file.get()) == 0 && (!synced || fsync(fd) == 0);
    FAISS_THROW_IF_NOT_FMT(
            flushed,
            "%s: cannot be written: %s",
            path.c_str(),
            std::strerror(errno));
}

void check_created(bool created, const std::string& path) {
    FAISS_THROW_IF_NOT_FMT(
            created, "%s: cannot be created: %s", path.c_str(), std::strerror(errno));
}

} // namespace

bool is_written_in_place(const std::string& path) {
    for (const char* numbered : {"/dev/std", "/dev/fd/", "/proc/"}) {
        if (path.rfind(numbered, 0) == 0) {
            return true;
        }
    }
    struct stat status;
    return stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode) &&
            !S_ISDIR(status.st_mode);
}

std::string behind_links(const std::string& path) {
    namespace fs = std::filesystem;
    fs::path at = path;
    std::error_code error;
    for (int i = 0; i < 40 && fs::is_symlink(at, error); i++) { // as many as Linux follows
        at = at.parent_path() / fs::read_symlink(at, error);
    }
    return at.string();
}

void write_file(
        const std::string& path,
        const std::function<void(FileSink&)>& body) {
    check_path(path);
    if (is_written_in_place(path)) {
        const int fd = open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
        check_created(fd >= 0, path);
        write_to(fd, path, /*synced=*/false, body);
        return;
    }
    const std::string target = behind_links(path);
    int fd = -1;
    std::string temporary;
    std::random_device random;
    do {
        temporary = target + ".tmp" + std::to_string(random());
        fd = open(
                temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd < 0 && errno == EEXIST);
    check_created(fd >= 0, path);
    struct stat old;
    if (stat(target.c_str(), &old) == 0) { // who may read it stays as it was
        fchmod(fd, old.st_mode & 0777);
    }
    try {
        write_to(fd, path, /*synced=*/true, body);
        check_created(rename(temporary.c_str(), target.c_str()) == 0, path);
    } catch (...) {
        unlink(temporary.c_str());
        throw;
    }
}

} // namespace faiss_saap
